#pragma once

// Typed kernels of annulus/ops/adamw.h, one overload per device. Arguments are checked.

#include "annulus/ops/adamw.h"

namespace annulus::kernels {

template <typename T>
absl::Status AdamWUpdate(CpuTag, const AdamWHyper& hyper, const AdamWTensors& tensors);

}  // namespace annulus::kernels
