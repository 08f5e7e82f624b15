#pragma once

// Small element-wise operations and reductions. Scalars that ops make for other ops are f64 tensors of one
// element on the context's device, so that no host waits between them.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

absl::Status Zero(Context& ctx, TensorRef x);
absl::Status Copy(Context& ctx, ConstTensorRef x, TensorRef y);  // equal dtypes
absl::Status Cast(Context& ctx, ConstTensorRef x, TensorRef y);  // between floating dtypes, to nearest even
absl::Status AddInPlace(Context& ctx, ConstTensorRef x, TensorRef y);  // y += x, equal dtypes
absl::Status Scale(Context& ctx, double factor, TensorRef x);
// Every row of y = x.   x: [columns]   y: [.., columns], equal dtypes
absl::Status RepeatRow(Context& ctx, ConstTensorRef x, TensorRef y);

// sum += sum of squares of x, accumulated in f64 in a fixed order.   sum: f64 [1]
absl::Status AddSumOfSquares(Context& ctx, ConstTensorRef x, TensorRef sum);

// factor = min(1, max_norm / sqrt(stats[0])), 1 if max_norm is 0; NaN unless all of stats are finite.
//   stats: f64 [n], the global sum of squares of the gradient first   factor: f64 [1]
absl::Status ClipFactor(Context& ctx, ConstTensorRef stats, double max_norm, TensorRef factor);

}  // namespace annulus
