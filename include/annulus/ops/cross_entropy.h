#pragma once

// Output projection and cross-entropy in chunks of tokens: full logits never exist.
//   logits[t] = x[t] w^T ;  loss[t] = log sum exp(logits[t]) - logits[t, target[t]]

#include <functional>

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// Logits of one chunk at a 128K vocabulary: 2 GiB in f32, about what a layer takes. Each chunk reads and
// writes the gradient of w once, which larger chunks would do less often.
inline constexpr int64_t kLossChunkTokens = 4096;

// Tokens whose logits exist at once on CPUs, out of a chunk.
int64_t CpuLossChunkTokens(int64_t chunk_tokens, int64_t vocab);

// Where w holds a part of the vocabulary: which, and a call that makes sums over all parts. It gets for each
// token of a chunk the logarithm of the sum of exponentials and the target's logit (0 where the target is in
// another part) and replaces them by those of the whole vocabulary.   stats: accumulator dtype, [tokens, 2]
//
// Holders of parts take the same chunks if they ask for chunks of the same size, on CPUs of at most
// CpuLossChunkTokens of the largest part.
struct VocabularyPart {
  int64_t begin = 0;                                     // the target that is row 0 of w
  std::function<absl::Status(TensorRef stats)> combine;  // empty: w is the whole vocabulary
};

// What `combine` is to make of the stats of all parts, in their order.
//   parts: [parts, tokens, 2]   stats: [tokens, 2], overwritten
absl::Status MergeVocabularyStats(Context& ctx, ConstTensorRef parts, TensorRef stats);

struct LinearCrossEntropy {
  ConstTensorRef x;        // [tokens, d]
  ConstTensorRef w;        // [vocab, d]
  ConstTensorRef targets;  // i32 [tokens]; negative: not counted. On GPUs the caller has checked them
  int64_t chunk_tokens = kLossChunkTokens;
  VocabularyPart part = {};
};

// loss += sum over counted tokens of the loss in nats.   loss: f64 [1]
absl::Status LinearCrossEntropyForward(Context& ctx, const LinearCrossEntropy& args, TensorRef loss);

// The same, and dx = scale * d(sum)/dx (overwritten; of a part, its summand), dw += scale * d(sum)/dw.
struct LinearCrossEntropyGradients {
  double scale = 1;
  TensorRef dx;  // [tokens, d], as x
  TensorRef dw;  // [vocab, d], accumulator dtype
};
absl::Status LinearCrossEntropyForwardBackward(Context& ctx, const LinearCrossEntropy& args,
                                               const LinearCrossEntropyGradients& gradients, TensorRef loss);

// Bytes of ctx.scratch that either takes at most, with the whole vocabulary or with that many rows of it.
enum class VocabularyHeld { kWhole, kPart };
int64_t LinearCrossEntropyScratchBytes(DeviceKind device, DType dtype, int64_t tokens, int64_t vocab,
                                       VocabularyHeld held = VocabularyHeld::kWhole);

}  // namespace annulus
