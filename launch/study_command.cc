// `annulus study`: a scaling study, point by point. It needs no mpirun: it starts the ranks of each point
// itself.

#include <sched.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "annulus/base/file.h"
#include "annulus/device/gpu.h"
#include "annulus/study/report.h"
#include "annulus/study/study_run.h"
#include "annulus/train/profile.h"
#include "annulus/train/report.h"
#include "annulus/train/study_config.h"
#include "commands.h"

namespace annulus {
namespace {

// What is finished is on disk; mpirun ends its ranks when this process ends.
void OnStopSignal(int signal) {
  constexpr char kText[] = "\nannulus study: stopped; the same command goes on where it was\n";
  if (write(STDERR_FILENO, kText, sizeof(kText) - 1) < 0) _exit(128 + signal);
  _exit(128 + signal);
}

int64_t Cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

absl::StatusOr<MeasuringMachine> FindMachine(const Arguments& arguments) {
  ANNULUS_ASSIGN_OR_RETURN(ProgramPaths program, FindProgram());
  MeasuringMachine machine{.program = std::move(program), .gpus = GpuCount(), .cpu_ranks = Cores()};
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> ranks, arguments.PositiveInt("--ranks"));
  if (ranks.has_value()) {
    machine.cpu_ranks = *ranks;
    machine.gpus = machine.gpus > 0 ? *ranks : 0;  // ranks may share a GPU
  }
  if (arguments.Has("--hostfile")) {
    const std::string path = arguments.Last("--hostfile", "");
    ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    ANNULUS_ASSIGN_OR_RETURN(machine.hosts, ParseHostfile(path, text));
  }
  return machine;
}

absl::Status WriteReports(const std::string& folder, const StudyResults& results) {
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(folder + "/results.csv", StudyCsv(results)));
  return WriteFileAtomically(folder + "/report.html", StudyHtml(results));
}

StudyHooks Hooks(const StudySpec& spec, const MeasuringMachine& machine, const MachineProfile& profile,
                 const std::string& folder) {
  StudyHooks hooks;
  hooks.can_measure = [&](const PlannedPoint& planned) { return CanMeasure(machine, planned); };
  hooks.measure = [&](const PlannedPoint& planned, const std::string& point_folder) {
    return MeasurePoint(spec, machine, planned, point_folder);
  };
  hooks.predict = [&](const PlannedPoint& planned) { return PredictPoint(spec, planned); };
  hooks.prediction_inputs = ProfileText(profile);
  hooks.say = [](const std::string& line) {
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  };
  hooks.report = [folder](const StudyResults& results) { return WriteReports(folder, results); };
  return hooks;
}

// Points that make no sense often share the reason: each reason once, with how many there are.
void PrintSummary(const std::vector<PlannedPoint>& points, const StudyResults& results) {
  int64_t measured = 0, simulated = 0, failed = 0, refused = 0, open = 0;
  std::map<std::string, int64_t> reasons;
  for (size_t i = 0; i < points.size(); ++i) {
    const PointResult& result = results.points[i];
    if (!points[i].refused.ok()) {
      ++refused;
      ++reasons[result.reason];
    } else if (result.state == PointState::kFailed) {
      ++failed;
      std::printf("FAILED: %s: %s\n", result.point.id.c_str(), result.reason.c_str());
    } else if (result.state == PointState::kOpen) {
      ++open;
    } else {
      ++(result.measured ? measured : simulated);
    }
  }
  for (const auto& [reason, count] : reasons) {
    std::printf("%s: %s\n", CountText(count, "point").c_str(), reason.c_str());
  }
  std::printf("%zu points: %ld measured, %ld simulated alone, %ld failed, %ld refused, %ld open\n",
              points.size(), measured, simulated, failed, refused, open);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) {
    return Invalid("annulus study: expected to be started without mpirun: it starts the ranks of each point");
  }
  const std::string& path = arguments.operand();
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedStudy study, LoadStudy(path, text, arguments.All("--set")));
  ANNULUS_ASSIGN_OR_RETURN(const std::string run_text, ReadFile(study.spec.run));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<PlannedPoint> points, StudyGrid(study.spec, run_text));
  ANNULUS_ASSIGN_OR_RETURN(const MachineProfile profile, ProfileOfStudy(points));
  ANNULUS_ASSIGN_OR_RETURN(const MeasuringMachine machine, FindMachine(arguments));

  const bool slurm = arguments.Has("--slurm");
  const StudyRunOptions options{
      .folder = arguments.Last("--out", absl::StrCat("runs/study-", study.spec.name)),
      .program = machine.program,
      .study_text = study.text,
      .failed = arguments.Has("--retry") ? StudyRunOptions::Failed::kRetry : StudyRunOptions::Failed::kKeep,
      .only = arguments.Last("--point", ""),
      .slurm = slurm ? StudyRunOptions::Slurm::kWriteScripts : StudyRunOptions::Slurm::kNone};
  std::signal(SIGINT, OnStopSignal);
  std::signal(SIGTERM, OnStopSignal);
  ANNULUS_ASSIGN_OR_RETURN(
      const StudyResults results,
      RunStudy(study.spec, points, options, Hooks(study.spec, machine, profile, options.folder),
               OpenResults(study.spec, points, profile)));
  PrintSummary(points, results);
  const char* folder = options.folder.c_str();
  if (slurm) std::printf("%s/submit-all hands the points that do not fit here over to Slurm\n", folder);
  std::printf("%s/report.html %s/results.csv\n", folder, folder);
  return absl::OkStatus();
}

}  // namespace

Command StudyCommand() {
  return {
      {"study",
       "CONFIG",
       "measures and simulates every point of a scaling study; started again it goes on",
       {{"--out", Option::Takes::kValue, "DIR", "folder of the study (default: runs/study-NAME)"},
        {"--ranks", Option::Takes::kValue, "N",
         "measures points of up to N ranks here (default: as many as GPUs, else cores)"},
        {"--hostfile", Option::Takes::kValue, "FILE", "measures on these hosts, lines of \"name slots=8\""},
        {"--slurm", Option::Takes::kNothing, "",
         "writes a script for each point that cannot be measured here, and DIR/submit-all"},
        {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field of the base run; repeatable"},
        {"--point", Option::Takes::kValue, "ID", "runs this point alone"},
        {"--retry", Option::Takes::kNothing, "", "runs failed points again"}}},
      Run};
}

}  // namespace annulus
