// `annulus study`: a scaling study, point by point. It needs no mpirun: it starts the ranks of each point
// itself.

#include <sched.h>
#include <unistd.h>

#include <algorithm>
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

StudyHooks Hooks(const StudySpec& spec, const MeasuringMachine& machine, const std::string& folder) {
  StudyHooks hooks;
  hooks.can_measure = [&](const PlannedPoint& planned) { return CanMeasure(machine, planned); };
  hooks.measure = [&](const PlannedPoint& planned, const std::string& point_folder) {
    return MeasurePoint(spec, machine, planned, point_folder);
  };
  hooks.predict = [&](const PlannedPoint& planned) { return PredictPoint(spec, planned); };
  hooks.prediction_inputs = PredictionInputs;
  hooks.say = [](const std::string& line) {
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  };
  hooks.report = [folder](const StudyResults& results) { return WriteReports(folder, results); };
  return hooks;
}

// Points that are refused often share the reason: each reason once, with how many there are.
void PrintRefused(const StudyResults& results) {
  std::map<std::string, std::vector<std::string>> ids;
  for (const PointResult& result : results.points) {
    if (result.state == PointState::kRefused) ids[result.reason].push_back(result.point.id);
  }
  for (const auto& [reason, points] : ids) {
    const auto count = static_cast<int64_t>(points.size());
    std::printf("%s: %s\n", (count == 1 ? points.front() : CountText(count, "point")).c_str(),
                reason.c_str());
  }
}

void PrintSummary(const StudyResults& results) {
  const auto count = [&](const auto& holds) {
    return std::count_if(results.points.begin(), results.points.end(), holds);
  };
  const auto in = [&](PointState state) {
    return absl::StrCat(count([state](const PointResult& result) { return result.state == state; }), " ",
                        Name(state));
  };
  for (const PointResult& result : results.points) {
    if (result.state == PointState::kFailed)
      std::printf("FAILED: %s: %s\n", result.point.id.c_str(), result.reason.c_str());
  }
  PrintRefused(results);
  const auto done = [&](bool measured) {
    return count([measured](const PointResult& result) {
      return result.state == PointState::kDone && result.measured.has_value() == measured;
    });
  };
  std::printf("%s: %ld measured, %ld simulated alone, %s, %s, %s\n",
              CountText(static_cast<int64_t>(results.points.size()), "point").c_str(), done(true),
              done(false), in(PointState::kFailed).c_str(), in(PointState::kRefused).c_str(),
              in(PointState::kOpen).c_str());
  for (const std::string& line : StudyFindings(results)) std::printf("%s\n", line.c_str());
}

// Of the points that this command was to run. What failed in an earlier start counts too.
absl::Status CheckNoneFailed(const StudyResults& results, const StudyRunOptions& options) {
  const auto failed =
      std::count_if(results.points.begin(), results.points.end(), [&](const PointResult& result) {
        const bool wanted = options.only.empty() || options.only == result.point.id;
        return wanted && result.state == PointState::kFailed;
      });
  if (failed == 0) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat(CountText(failed, "point"), " failed, as said above; --retry runs failed points again"));
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
  ANNULUS_ASSIGN_OR_RETURN(StudyResults open, OpenResults(study.spec, points));
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
      RunStudy(study.spec, points, options, Hooks(study.spec, machine, options.folder), std::move(open)));
  PrintSummary(results);
  const char* folder = options.folder.c_str();
  if (slurm) std::printf("%s/submit-all hands the points that do not fit here over to Slurm\n", folder);
  std::printf("%s/report.html %s/results.csv\n", folder, folder);
  std::fflush(stdout);
  return CheckNoneFailed(results, options);
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
