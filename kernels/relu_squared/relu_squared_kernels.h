#pragma once

// Typed kernels of annulus/ops/relu_squared.h, one overload per device. Arguments are checked.

#include "annulus/ops/relu_squared.h"

namespace annulus::kernels {

template <typename T>
absl::Status ReluSquaredForward(CpuTag, Context& ctx, ConstTensorRef x, TensorRef h);
template <typename T>
absl::Status ReluSquaredForward(CudaTag, Context& ctx, ConstTensorRef x, TensorRef h);

template <typename T>
absl::Status ReluSquaredBackward(CpuTag, Context& ctx, ConstTensorRef x, ConstTensorRef dh, TensorRef dx);
template <typename T>
absl::Status ReluSquaredBackward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef dh, TensorRef dx);

}  // namespace annulus::kernels
