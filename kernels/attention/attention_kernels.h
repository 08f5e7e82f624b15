#pragma once

// Typed kernels of annulus/ops/attention.h, one overload per device. Arguments are checked.

#include "annulus/ops/attention.h"

namespace annulus::kernels {

template <typename T>
absl::Status ResetPartial(CpuTag, const AttentionPartial& partial);
template <typename T>
absl::Status AttentionForward(CpuTag, Context& ctx, const AttentionBlock& block,
                              const AttentionPartial& partial);
template <typename T>
absl::Status AttentionDelta(CpuTag, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta);
template <typename T>
absl::Status AttentionBackward(CpuTag, Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients);

}  // namespace annulus::kernels
