#pragma once

// Typed kernels of annulus/ops/cross_entropy.h, one overload per device. Arguments are checked.

#include "annulus/ops/cross_entropy.h"

namespace annulus::kernels {

struct LossGradients {
  double scale = 1;
  TensorRef dx, dw;
};

// Computes the loss alone where `gradients` is null.
template <typename T>
absl::StatusOr<double> LinearCrossEntropy(CpuTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                          const LossGradients* gradients);

}  // namespace annulus::kernels
