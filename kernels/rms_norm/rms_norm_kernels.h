#pragma once

// Typed kernels of annulus/ops/rms_norm.h, one overload per device. Arguments are checked.

#include "annulus/ops/rms_norm.h"

namespace annulus::kernels {

template <typename T>
absl::Status RmsNormForward(CpuTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                            TensorRef y);
template <typename T>
absl::Status RmsNormForward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                            TensorRef y);

struct RmsNormGradients {
  ConstTensorRef dy;
  TensorRef dx, dw;
};

template <typename T>
absl::Status RmsNormBackward(CpuTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                             const RmsNormGradients& gradients);
template <typename T>
absl::Status RmsNormBackward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                             const RmsNormGradients& gradients);

}  // namespace annulus::kernels
