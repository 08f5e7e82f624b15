#pragma once

// Points that this machine has no ranks for, as jobs of Slurm: a script that measures, and what it left.

#include <optional>
#include <string>
#include <vector>

#include "annulus/study/study_run.h"

namespace annulus {

// Writes the point's configuration and script into its folder; returns the script's path. `key` names the
// runs, so that those of an older configuration are not taken for them.
absl::StatusOr<std::string> WriteSlurmScript(const StudySpec& spec, const PlannedPoint& planned,
                                             const std::string& key, const ProgramPaths& program,
                                             const std::string& folder);

// DIR/submit-all, which hands over all of them.
absl::Status WriteSubmitAll(const std::string& study_folder, const std::vector<std::string>& scripts);

// Of the runs that a script has made, all of them finished; else nothing.
std::optional<Measurement> CollectSlurmRuns(const StudySpec& spec, const std::string& key,
                                            const std::string& folder);

}  // namespace annulus
