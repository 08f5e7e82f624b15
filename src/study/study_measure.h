#pragma once

// Figures of a measured point, from the run directories of its runs.

#include <string>
#include <vector>

#include "annulus/study/study_run.h"

namespace annulus {

// Medians over the `steps` steps after `warm_up` of metrics.jsonl. InvalidArgument names what is missing.
absl::StatusOr<StepFigures> FiguresOfRun(const std::string& run_dir, int64_t warm_up, int64_t steps);

// The run whose step time is the median, the lower one of two; not empty.
Measurement MedianRun(std::vector<StepFigures> runs);

}  // namespace annulus
