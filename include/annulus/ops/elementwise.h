#pragma once

// Small element-wise operations and reductions.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

absl::Status Zero(Context& ctx, TensorRef x);
absl::Status Copy(Context& ctx, ConstTensorRef x, TensorRef y);        // equal dtypes
absl::Status AddInPlace(Context& ctx, ConstTensorRef x, TensorRef y);  // y += x, equal dtypes
absl::Status Scale(Context& ctx, double factor, TensorRef x);
// Sum of squares, accumulated in f64 in a fixed order.
absl::StatusOr<double> SumOfSquares(Context& ctx, ConstTensorRef x);

}  // namespace annulus
