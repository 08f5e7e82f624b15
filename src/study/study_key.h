#pragma once

// What results of points depend on, as text and as keys: equal for equal work.

#include <string>

#include "annulus/study/study_run.h"

namespace annulus {

std::string KeyOf(const std::string& text);

// What a measured run of the point is, wherever its values come from.
std::string RunTextOf(const PlannedPoint& planned);

// `runs`: RunTextOf its point.
std::string MeasurementKey(const StudySpec& spec, const std::string& runs);
// `inputs`: StudyHooks::prediction_inputs of the point.
std::string PredictionKey(const StudySpec& spec, const PlannedPoint& planned, const std::string& runs,
                          const std::string& inputs);

}  // namespace annulus
