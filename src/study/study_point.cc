// Measuring a point: its ranks under launch/mpirun, once for each repeat.

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/study/study_run.h"
#include "study_job.h"
#include "study_measure.h"

namespace annulus {
namespace {

// One more than those of earlier starts: what they left is not touched, as their ranks may still be ending.
absl::StatusOr<int64_t> NextRun(const std::string& folder) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  int64_t last = 0;
  for (const std::string& name : names) {
    int64_t number = 0;
    absl::string_view digits = name;
    if (!absl::ConsumePrefix(&digits, "run-")) continue;
    absl::ConsumeSuffix(&digits, ".log");
    if (absl::SimpleAtoi(digits, &number)) last = std::max(last, number);
  }
  return last + 1;
}

// The point's hosts alone, each with the ranks that it is to have.
std::string HostfileOf(const MeasuringMachine& machine, const StudyPoint& point) {
  std::string text;
  for (int64_t i = 0; i < point.hosts; ++i) {
    absl::StrAppend(&text, machine.hosts[static_cast<size_t>(i)].name, " slots=", point.ranks / point.hosts,
                    "\n");
  }
  return text;
}

}  // namespace

absl::StatusOr<ProgramPaths> FindProgram() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  for (const std::filesystem::path& tree :
       {self.parent_path().parent_path(), std::filesystem::path(ANNULUS_SOURCE_DIR)}) {
    const std::filesystem::path mpirun = tree / "launch/mpirun";
    if (Exists(mpirun)) return ProgramPaths{.mpirun = mpirun, .program = self};
  }
  return absl::NotFoundError(absl::StrCat(self.string(), ": expected launch/mpirun beside its folder"));
}

absl::StatusOr<std::vector<MeasuringMachine::Host>> ParseHostfile(const std::string& name,
                                                                  const std::string& text) {
  std::vector<MeasuringMachine::Host> hosts;
  int line_number = 0;
  for (const absl::string_view whole : absl::StrSplit(text, '\n')) {
    ++line_number;
    const absl::string_view line = whole.substr(0, whole.find('#'));
    const std::vector<std::string> words = absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    MeasuringMachine::Host host{.name = words[0], .ranks = 1};
    for (size_t i = 1; i < words.size(); ++i) {
      absl::string_view count = words[i];
      if (!absl::ConsumePrefix(&count, "slots=")) continue;
      if (!absl::SimpleAtoi(count, &host.ranks) || host.ranks < 1) {
        return Invalid(name, ":", line_number, ": ", words[i], ": expected slots=N, at least 1");
      }
    }
    hosts.push_back(std::move(host));
  }
  if (hosts.empty()) return Invalid(name, ": expected at least one line such as \"node1 slots=8\"");
  return hosts;
}

bool CanMeasure(const MeasuringMachine& machine, const PlannedPoint& planned) {
  const StudyPoint& point = planned.point;
  if (!planned.refused.ok()) return false;
  if (!machine.hosts.empty()) {
    const int64_t each = point.ranks / point.hosts;
    if (point.hosts > static_cast<int64_t>(machine.hosts.size())) return false;
    return std::all_of(machine.hosts.begin(),
                       machine.hosts.begin() + static_cast<std::ptrdiff_t>(point.hosts),
                       [each](const MeasuringMachine::Host& host) { return host.ranks >= each; });
  }
  const DeviceChoice device = planned.config.spec.device;
  const bool on_gpus = device == DeviceChoice::kCuda || (device == DeviceChoice::kAuto && machine.gpus > 0);
  return point.hosts == 1 && point.ranks <= (on_gpus ? machine.gpus : machine.cpu_ranks);
}

absl::StatusOr<Measurement> MeasurePoint(const StudySpec& spec, const MeasuringMachine& machine,
                                         const PlannedPoint& planned, const std::string& folder) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t first, NextRun(folder));
  std::vector<std::string> words = {machine.program.mpirun, "-n", absl::StrCat(planned.point.ranks)};
  if (!machine.hosts.empty()) {
    ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(folder + "/hostfile", HostfileOf(machine, planned.point)));
    words.insert(words.end(), {"--hostfile", folder + "/hostfile"});
  }
  words.insert(words.end(), {machine.program.program, "train", folder + "/config.textproto", "--run_dir"});
  std::vector<Measurement> runs;
  for (int64_t i = 0; i < spec.repeats; ++i) {
    const std::string run_dir = absl::StrFormat("%s/run-%04d", folder, first + i);
    ChildJob job{.words = words, .log = run_dir + ".log", .limit_seconds = spec.limit_minutes * 60};
    job.words.push_back(run_dir);
    ANNULUS_RETURN_IF_ERROR(RunChildJob(job));
    ANNULUS_ASSIGN_OR_RETURN(runs.emplace_back(), MeasurementOfRun(run_dir, spec.warm_up, spec.steps));
  }
  return MedianRun(std::move(runs));
}

}  // namespace annulus
