#pragma once

// Typed kernels of annulus/ops/conv1d.h, one overload per device. Arguments are checked; T is that of x.

#include "annulus/ops/conv1d.h"

namespace annulus::kernels {

template <typename T>
absl::Status Conv1dForward(CpuTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y);
template <typename T>
absl::Status Conv1dForward(CudaTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y);

template <typename T>
absl::Status Conv1dBackward(CpuTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients);
template <typename T>
absl::Status Conv1dBackward(CudaTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients);

}  // namespace annulus::kernels
