#include "study_slurm.h"

#include <sys/stat.h>

#include <cmath>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "annulus/base/file.h"
#include "study_measure.h"

namespace annulus {
namespace {

// In single quotes for a shell.
std::string Quoted(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

std::string Absolute(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::absolute(path, ignored).lexically_normal().string();
}

std::string RunDirectories(const std::string& key, const std::string& folder) {
  return absl::StrCat(folder, "/slurm-", key.substr(0, 8), "-");
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

}  // namespace

absl::StatusOr<std::string> WriteSlurmScript(const StudySpec& spec, const PlannedPoint& planned,
                                             const std::string& key, const ProgramPaths& program,
                                             const std::string& folder) {
  const std::string path = Absolute(folder), config = path + "/config.textproto";
  std::error_code ignored;
  const std::string text = absl::StrFormat(
      R"(#!/usr/bin/env bash
#SBATCH --job-name=annulus-%s
#SBATCH --nodes=%d
#SBATCH --ntasks-per-node=%d
#SBATCH --cpus-per-task=1
#SBATCH --time=%s
#SBATCH --open-mode=append
#SBATCH --output=%s/slurm-%%j.log
# Measures one point of the study; `annulus study` collects what it leaves. Runs that are finished stay.
set -euo pipefail
cd %s
for ((run = 1; run <= %d; run++)); do
  run_dir=%s$run
  if grep -qs '"event":"done"' "$run_dir/events.jsonl"; then continue; fi
  rm -rf "$run_dir"
  %s -n "$SLURM_NTASKS" %s train %s --run_dir "$run_dir"
done
)",
      spec.name, planned.point.hosts, planned.point.ranks / planned.point.hosts, TimeLimit(spec), path,
      Quoted(std::filesystem::current_path(ignored).string()), spec.repeats,
      Quoted(RunDirectories(key, path)), Quoted(program.mpirun), Quoted(program.program), Quoted(config));
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

std::optional<Measurement> CollectSlurmRuns(const StudySpec& spec, const std::string& key,
                                            const std::string& folder) {
  std::vector<StepFigures> runs;
  for (int64_t run = 1; run <= spec.repeats; ++run) {
    const std::string run_dir = absl::StrCat(RunDirectories(key, folder), run);
    if (!IsFinished(run_dir)) return std::nullopt;
    absl::StatusOr<StepFigures> figures = FiguresOfRun(run_dir, spec.warm_up, spec.steps);
    if (!figures.ok()) return std::nullopt;
    runs.push_back(*std::move(figures));
  }
  return MedianRun(std::move(runs));
}

}  // namespace annulus
