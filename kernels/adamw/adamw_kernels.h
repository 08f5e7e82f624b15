#pragma once

// Kernels of annulus/ops/adamw.h, one overload per device. Arguments are checked: parameter, gradient and
// state are f32 or f64 on CPUs and f32 on GPUs, the copy is of any compute dtype.

#include "annulus/ops/adamw.h"

namespace annulus::kernels {

absl::Status AdamWUpdate(CpuTag, Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors);
absl::Status AdamWUpdate(CudaTag, Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors);

}  // namespace annulus::kernels
