#pragma once

// Typed kernels of annulus/ops/elementwise.h, one overload per device. Arguments are checked.

#include "annulus/ops/elementwise.h"

namespace annulus::kernels {

absl::Status ZeroBytes(CpuTag, TensorRef x);
absl::Status CopyBytes(CpuTag, ConstTensorRef x, TensorRef y);
template <typename T>
absl::Status AddInPlace(CpuTag, ConstTensorRef x, TensorRef y);
template <typename T>
absl::Status Scale(CpuTag, double factor, TensorRef x);
template <typename T>
absl::StatusOr<double> SumOfSquares(CpuTag, ConstTensorRef x);

}  // namespace annulus::kernels
