#pragma once

// Typed kernels of annulus/ops/rope.h, one overload per device. Arguments are checked.

#include "annulus/ops/rope.h"

namespace annulus::kernels {

template <typename T>
absl::Status Rope(CpuTag, Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first);
template <typename T>
absl::Status Rope(CudaTag, Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first);

}  // namespace annulus::kernels
