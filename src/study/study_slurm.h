#pragma once

// Points that this machine has no ranks for, as jobs of Slurm: a script that measures, and what it left.

#include <optional>
#include <string>
#include <vector>

#include "annulus/study/study_run.h"

namespace annulus {

// Of a point. `key` names its runs, so that those of an older configuration are not taken for them.
struct SlurmRuns {
  const StudySpec& spec;
  std::string key;
  std::string folder;  // of the point
};

// Writes the point's configuration and script into its folder; returns the script's path. InvalidArgument
// where its device cannot be, or Slurm cannot name the folder.
absl::StatusOr<std::string> WriteSlurmScript(const SlurmRuns& runs, const PlannedPoint& planned,
                                             const ProgramPaths& program);

// DIR/submit-all, which hands over all of them.
absl::Status WriteSubmitAll(const std::string& study_folder, const std::vector<std::string>& scripts);

// Of the runs that a script has made, all of them finished; an error is why one failed; else nothing.
absl::StatusOr<std::optional<Measurement>> Collect(const SlurmRuns& runs);
// So that Collect finds none.
absl::Status ForgetFailures(const SlurmRuns& runs);

}  // namespace annulus
