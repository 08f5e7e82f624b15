#pragma once

// Output projection and cross-entropy in chunks of tokens: full logits never exist.
//   logits[t] = x[t] w^T ;  loss[t] = log sum exp(logits[t]) - logits[t, target[t]]

#include "absl/types/span.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

inline constexpr int64_t kLossChunkTokens = 8192;  // logits of one chunk at a 128K vocabulary: 4 GiB in f32

// Tokens whose logits exist at once on CPUs, out of a chunk.
int64_t CpuLossChunkTokens(int64_t chunk_tokens, int64_t vocab);

struct LinearCrossEntropy {
  ConstTensorRef x;                   // [tokens, d]
  ConstTensorRef w;                   // [vocab, d]
  absl::Span<const int32_t> targets;  // negative: not counted
  int64_t chunk_tokens = kLossChunkTokens;
};

// Sum over counted tokens of the loss in nats.
absl::StatusOr<double> LinearCrossEntropyForward(Context& ctx, const LinearCrossEntropy& args);

// The same, and dx = scale * d(sum)/dx (overwritten), dw += scale * d(sum)/dw.
absl::StatusOr<double> LinearCrossEntropyForwardBackward(Context& ctx, const LinearCrossEntropy& args,
                                                         double scale, TensorRef dx, TensorRef dw);

}  // namespace annulus
