#pragma once

// result.json of a point: its result with keys of what it depends on, and what went wrong.

#include <string>

#include "annulus/study/study.h"

namespace annulus {

struct StoredPoint {
  PointResult result;
  // Hashes of all that the measurement and the prediction, or their errors, depend on.
  std::string measurement_key, prediction_key;
  std::string measurement_error, prediction_error;  // empty: none
};

std::string StoredPointJson(const StoredPoint& stored);
// DataLoss if it is no such text.
absl::StatusOr<StoredPoint> ParseStoredPoint(const std::string& text);

}  // namespace annulus
