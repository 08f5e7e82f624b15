#pragma once

// Reports of studies and runs: report.html is one file that needs no other and no network, readable on a
// screen, light or dark, without a mouse, and on paper; report.csv has the numbers.

#include <string>
#include <vector>

#include "annulus/base/status.h"
#include "annulus/study/study.h"

namespace annulus {

std::string StudyHtml(const StudyResults& results);
std::string StudyCsv(const StudyResults& results);
// How far predictions are off, and the planner's choices, each in a line; none where there is nothing to
// compare.
std::vector<std::string> StudyFindings(const StudyResults& results);

// What a study has stored in its folder so far. Points are those of its grid, open where nothing is stored.
// NotFound where it is no folder of a study; it also needs the files of the base run and the machine profile.
absl::StatusOr<StudyResults> ReadStudy(const std::string& study_dir);

// Of a run directory: loss, throughput, memory, events, from metrics.jsonl and events.jsonl. NotFound or
// InvalidArgument name what is missing or broken; a last line that is cut off is left out.
absl::StatusOr<std::string> RunHtml(const std::string& run_dir);
absl::StatusOr<std::string> RunCsv(const std::string& run_dir);

}  // namespace annulus
