#pragma once

// Typed kernels of annulus/ops/linear.h, one overload per device. Arguments are checked.

#include "annulus/ops/linear.h"

namespace annulus::kernels {

template <typename T>
absl::Status LinearForward(CpuTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write,
                           MatrixRef y);
template <typename T>
absl::Status LinearForward(CudaTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write,
                           MatrixRef y);

template <typename T>
absl::Status LinearBackwardInput(CpuTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx);
template <typename T>
absl::Status LinearBackwardInput(CudaTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx);

template <typename T>
absl::Status LinearBackwardWeight(CpuTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw);
template <typename T>
absl::Status LinearBackwardWeight(CudaTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw);

}  // namespace annulus::kernels
