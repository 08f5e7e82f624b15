#pragma once

// Typed kernels of annulus/ops/silu.h, one overload per device. Arguments are checked.

#include "annulus/ops/silu.h"

namespace annulus::kernels {

template <typename T>
absl::Status SiluForward(CpuTag, Context& ctx, ConstMatrixRef x, MatrixRef y);
template <typename T>
absl::Status SiluForward(CudaTag, Context& ctx, ConstMatrixRef x, MatrixRef y);

template <typename T>
absl::Status SiluBackward(CpuTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx);
template <typename T>
absl::Status SiluBackward(CudaTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx);

template <typename T>
absl::Status SigmoidForward(CpuTag, Context& ctx, ConstMatrixRef x, TensorRef y);
template <typename T>
absl::Status SigmoidForward(CudaTag, Context& ctx, ConstMatrixRef x, TensorRef y);

template <typename T>
absl::Status SigmoidBackward(CpuTag, Context& ctx, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx);
template <typename T>
absl::Status SigmoidBackward(CudaTag, Context& ctx, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx);

}  // namespace annulus::kernels
