#pragma once

// Typed kernels of annulus/ops/rope.h, one overload per device. Arguments are checked.

#include "annulus/device/context.h"
#include "annulus/ops/rope.h"

namespace annulus::kernels {

template <typename T>
absl::Status Rope(CpuTag, Context& ctx, absl::Span<const int64_t> positions, double theta,
                  RopeDirection direction, HeadsRef x);

}  // namespace annulus::kernels
