#include "study_slurm.h"

#include <sys/stat.h>

#include <cmath>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "annulus/base/file.h"
#include "annulus/train/exchange.h"
#include "annulus/train/placement.h"
#include "study_job.h"
#include "study_measure.h"

namespace annulus {
namespace {

constexpr char kTookTooLong[] = "took longer than measure.limit_minutes";

// In single quotes for a shell.
std::string Quoted(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

std::string Absolute(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::absolute(path, ignored).lexically_normal().string();
}

// A number follows: slurm-KEY-1.
std::string RunPrefix(const SlurmRuns& runs) {
  return absl::StrCat(Absolute(runs.folder), "/slurm-", runs.key.substr(0, 8), "-");
}

absl::Status WriteScript(const std::string& path, const std::string& text) {
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(path, text));
  return chmod(path.c_str(), 0755) == 0 ? absl::OkStatus() : FileError("make executable", path);
}

bool IsFinished(const std::string& run_dir) {
  const absl::StatusOr<std::string> events = ReadFile(run_dir + "/events.jsonl");
  return events.ok() && absl::StrContains(*events, "\"event\":\"done\"");
}

// Of the whole job, with a minute to start each run.
std::string TimeLimit(const StudySpec& spec) {
  const auto minutes =
      static_cast<int64_t>(std::ceil(static_cast<double>(spec.repeats) * (spec.limit_minutes + 1)));
  return absl::StrFormat("%02d:%02d:00", minutes / 60, minutes % 60);
}

// Each job sees as many GPUs of a node as it has ranks there.
absl::StatusOr<std::string> GpuLine(const PlannedPoint& planned) {
  RunSpec run = planned.config.spec;
  ANNULUS_RETURN_IF_ERROR(ResolvePlannedDevice(&run));
  if (DeviceKindOf(run.device) != DeviceKind::kCuda) return "";
  return absl::StrCat("#SBATCH --gres=gpu:", planned.point.ranks / planned.point.hosts, "\n");
}

std::string Directives(const SlurmRuns& runs, const PlannedPoint& planned, const std::string& gpus) {
  return absl::StrFormat(R"(#SBATCH --job-name=annulus-%s-%s
#SBATCH --nodes=%d
#SBATCH --ntasks-per-node=%d
#SBATCH --cpus-per-task=1
%s#SBATCH --time=%s
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output="%s/slurm-%%j.log"
)",
                         runs.spec.name, runs.key.substr(0, 8), planned.point.hosts,
                         planned.point.ranks / planned.point.hosts, gpus, TimeLimit(runs.spec),
                         Absolute(runs.folder));
}

// A run that is finished stays; one that failed leaves its reason in RUN.failed, and the others are not
// begun.
std::string Body(const SlurmRuns& runs, const ProgramPaths& program, const std::string& config) {
  std::error_code ignored;
  return absl::StrFormat(
      R"(set -euo pipefail
cd %s
limit=%d  # seconds of a run
ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM
for ((run = 1; run <= %d; run++)); do
  run_dir=%s$run
  if grep -qs '"event":"done"' "$run_dir/events.jsonl"; then continue; fi
  rm -rf "$run_dir" "$run_dir.failed"
  start=$SECONDS status=0
  timeout --kill-after=30 "$limit" %s -n "$SLURM_NTASKS" %s train %s --run_dir "$run_dir" \
    >"$run_dir.log" 2>&1 || status=$?
  ((status == 0)) && continue
  reason="exit code $status"
  ((status != 124 && (status != 137 || SECONDS - start < limit))) || reason=%s
  [[ $ended_by_slurm == no ]] || reason="ended by Slurm: its time limit, or scancel"
  echo "$reason" >"$run_dir.failed"
  echo "$run_dir: $reason" >&2
  exit 1
done
)",
      Quoted(std::filesystem::current_path(ignored).string()),
      static_cast<int64_t>(std::ceil(runs.spec.limit_minutes * 60)), runs.spec.repeats,
      Quoted(RunPrefix(runs)), Quoted(program.mpirun), Quoted(program.program), Quoted(config),
      Quoted(kTookTooLong));
}

}  // namespace

absl::StatusOr<std::string> WriteSlurmScript(const SlurmRuns& runs, const PlannedPoint& planned,
                                             const ProgramPaths& program) {
  const std::string path = Absolute(runs.folder), config = path + "/config.textproto";
  // What #SBATCH lines cannot quote, or take for a pattern.
  if (path.find_first_of("\"\\%\n") != std::string::npos) {
    return Invalid("--out: ", path, ": expected no \", \\, % or line end where Slurm is to write its log");
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::string gpus, GpuLine(planned));
  const std::string text =
      absl::StrCat("#!/usr/bin/env bash\n", Directives(runs, planned, gpus),
                   "# Measures one point of the study; `annulus study` collects what it leaves.\n",
                   Body(runs, program, config));
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(path));
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(config, planned.config.text));
  ANNULUS_RETURN_IF_ERROR(WriteScript(path + "/slurm.sbatch", text));
  return path + "/slurm.sbatch";
}

absl::Status WriteSubmitAll(const std::string& study_folder, const std::vector<std::string>& scripts) {
  std::string text =
      "#!/usr/bin/env bash\n# Hands every point that is to be measured elsewhere over to Slurm.\nset -euo "
      "pipefail\n";
  for (const std::string& script : scripts) absl::StrAppend(&text, "sbatch ", Quoted(script), "\n");
  return WriteScript(study_folder + "/submit-all", text);
}

absl::StatusOr<std::optional<Measurement>> Collect(const SlurmRuns& runs) {
  std::vector<Measurement> finished;
  for (int64_t run = 1; run <= runs.spec.repeats; ++run) {
    const std::string run_dir = absl::StrCat(RunPrefix(runs), run), log = run_dir + ".log";
    if (const absl::StatusOr<std::string> failed = ReadFile(run_dir + ".failed"); failed.ok()) {
      const std::string reason(absl::StripAsciiWhitespace(*failed));
      if (reason == kTookTooLong)
        return absl::DeadlineExceededError(TookTooLong(runs.spec.limit_minutes * 60, log));
      return absl::UnavailableError(absl::StrCat(reason, ": ", ReasonIn(log)));
    }
    if (!IsFinished(run_dir)) return std::nullopt;
    ANNULUS_ASSIGN_OR_RETURN(finished.emplace_back(),
                             MeasurementOfRun(run_dir, runs.spec.warm_up, runs.spec.steps));
  }
  return MedianRun(std::move(finished));
}

absl::Status ForgetFailures(const SlurmRuns& runs) {
  for (int64_t run = 1; run <= runs.spec.repeats; ++run) {
    ANNULUS_RETURN_IF_ERROR(RemoveAll(absl::StrCat(RunPrefix(runs), run, ".failed")));
  }
  return absl::OkStatus();
}

}  // namespace annulus
