#pragma once

// Reports of studies and runs: report.html is one file that needs no other and no network, readable on a
// screen, light or dark, without a mouse, and on paper; report.csv has the numbers.

#include <string>

#include "annulus/base/status.h"
#include "annulus/study/study.h"

namespace annulus {

std::string StudyHtml(const StudyResults& results);
std::string StudyCsv(const StudyResults& results);

// Of a run directory: loss, throughput, memory, events, from metrics.jsonl and events.jsonl. NotFound or
// InvalidArgument name what is missing or broken; a last line that is cut off is left out.
absl::StatusOr<std::string> RunHtml(const std::string& run_dir);
absl::StatusOr<std::string> RunCsv(const std::string& run_dir);

}  // namespace annulus
