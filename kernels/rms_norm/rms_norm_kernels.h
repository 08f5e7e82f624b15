#pragma once

// Typed kernels of annulus/ops/rms_norm.h, one overload per device. Arguments are checked.

#include "annulus/ops/rms_norm.h"

namespace annulus::kernels {

template <typename T>
absl::Status RmsNormForward(CpuTag, ConstTensorRef x, ConstTensorRef w, double eps, TensorRef y);

struct RmsNormGradients {
  ConstTensorRef dy;
  TensorRef dx, dw;
};

template <typename T>
absl::Status RmsNormBackward(CpuTag, ConstTensorRef x, ConstTensorRef w, double eps,
                             const RmsNormGradients& gradients);

}  // namespace annulus::kernels
