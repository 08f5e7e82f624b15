#pragma once

// Figures of a measured point, from the run directories of its runs.

#include <string>
#include <vector>

#include "annulus/study/study_run.h"

namespace annulus {

// Medians over the `steps` steps after `warm_up` of metrics.jsonl. InvalidArgument names what is missing.
absl::StatusOr<Measurement> MeasurementOfRun(const std::string& run_dir, int64_t warm_up, int64_t steps);

// "2 x NVIDIA H200": the ranks' devices, from the text of a run's env.json. Empty where it does not say.
std::string DevicesOf(const std::string& env);

// The run whose step time is the median, the lower one of two, with the devices of all; not empty.
Measurement MedianRun(std::vector<Measurement> runs);

}  // namespace annulus
