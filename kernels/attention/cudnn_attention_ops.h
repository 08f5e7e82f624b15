#pragma once

// The ops of annulus/ops/attention.h through cuDNN, for full and causal bf16 blocks with at least two query
// rows and a key row. Arguments are checked.
//
// The library gives results in bf16 and wants the statistics as [batch, heads, rows]. A block that carries
// pays for that with a pass in f32 (merge or add) over its results; a whole block only with a copy of the
// LSE.

#include "annulus/ops/attention.h"

namespace annulus::kernels {

absl::Status CudnnForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial);
absl::Status CudnnForwardWhole(Context& ctx, const AttentionBlock& block, HeadsRef out, TensorRef lse);
absl::Status CudnnBackward(Context& ctx, const AttentionBlock& block, const AttentionGradients& gradients);
absl::Status CudnnBackwardWhole(Context& ctx, const AttentionBlock& block,
                                const AttentionGradients& gradients);

}  // namespace annulus::kernels
