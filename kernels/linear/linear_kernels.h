#pragma once

// Typed kernels of annulus/ops/linear.h, one overload per device. Arguments are checked.

#include "annulus/ops/linear.h"

namespace annulus::kernels {

template <typename T>
absl::Status LinearForward(CpuTag, ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y);
template <typename T>
absl::Status LinearBackwardInput(CpuTag, ConstMatrixRef dy, ConstMatrixRef w, Write write, MatrixRef dx);
template <typename T>
absl::Status LinearBackwardWeight(CpuTag, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw);

}  // namespace annulus::kernels
