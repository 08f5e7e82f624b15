#pragma once

// The decoder: embedding, residual units as the pattern says, final RMSNorm, output head with chunked loss.
// Forward and backward are explicit; what is kept and what is recomputed is each layer's business
// (model/spec.h).
//
// Meta tokens are the first positions of every sequence: sequences are spec.meta_tokens longer than what is
// trained on, those positions hold the tokens vocab_size, vocab_size + 1, ..., have no targets, and belong to
// the first document.
//
// Over a tensor-parallel group tokens are split between mixers, the embedding and the head by rows of the
// vocabulary. Gradients of parameters that every rank holds whole are then of a part of the tokens or of the
// heads: the caller sums them over the group.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "annulus/model/mixer.h"
#include "annulus/ops/cross_entropy.h"

namespace annulus {

// A cp rank's part of a micro-batch, ordered (row, batch item), on the context's device; its sequences and
// masks are in the geometry. The same on every rank of a tensor-parallel group but for the numbering of
// tokens.
struct TokenSlice {
  ConstTensorRef tokens;   // i32 [rows * batch], LocalTokens; padding rows hold any token
  ConstTensorRef targets;  // i32 [rows * batch]; negative: not counted
};

// Rows of this rank's embedding for tokens of the vocabulary and meta tokens; negative where another rank
// holds them.
std::vector<int32_t> LocalTokens(const ModelSpec& spec, const ParamTable& table,
                                 absl::Span<const int32_t> tokens);

// The batch with meta tokens before every sequence.
SequenceBatch WithMetaTokens(const ModelSpec& spec, SequenceBatch sequences);

// Calls around the use of a bucket of parameters; either may be empty.
struct BucketHooks {
  std::function<absl::Status(int)> needed;  // before a pass first reads the bucket's values, in order
  std::function<absl::Status(int)> begun;   // before a pass first adds to its gradients
  std::function<absl::Status(int)> done;    // as soon as its gradients are complete, in reverse order
};

class Decoder {
 public:
  // `params` must have been built for `spec` and `shard`, and must outlive the decoder.
  Decoder(const ModelSpec& spec, Recompute recompute, const ParamStore& params, TensorShard shard = {});

  // loss += sum of the loss over the cp rank's counted tokens, in nats: the same on every rank of the
  // tensor-parallel group, which is step.tensor.   loss: f64 [1]
  absl::Status Loss(Context& ctx, ModelStep& step, const TokenSlice& slice, const BucketHooks& hooks,
                    TensorRef loss);

  // The same, and adds loss_scale * d(sum)/d(parameter) to every gradient.
  absl::Status LossAndGradients(Context& ctx, ModelStep& step, const TokenSlice& slice, double loss_scale,
                                const BucketHooks& hooks, TensorRef loss);

  // Logits of the cp rank's tokens first, first + 1, ...: [n, vocab], on every rank of the tensor-parallel
  // group. For sampling and tests: not in chunks.
  absl::Status Logits(Context& ctx, ModelStep& step, ConstTensorRef tokens, int64_t first, TensorRef logits);

  // For what looks into layers, without backward: x is the residual stream, [tokens / tp, d_model]. Embed
  // begins it, Advance takes it through a layer in place; keys and values for later layers stay in ctx.saved.
  absl::Status Embed(Context& ctx, ModelStep& step, ConstTensorRef tokens, TensorRef x);
  absl::Status Advance(Context& ctx, ModelStep& step, size_t layer, TensorRef x);
  // What the branches of a layer see.   normed: as x, overwritten
  absl::Status NormedInput(Context& ctx, size_t layer, ConstTensorRef x, TensorRef normed) const;

 private:
  struct Branch {
    std::unique_ptr<SequenceMixer> mixer;
    TensorRef norm, dnorm;  // of its output, with Combine::kMeanNorm
    TensorRef out;          // then kept from forward
  };
  struct Layer {
    std::string forward_name, backward_name;  // in a profiler's timeline: "layers.3.attention backward"
    TensorRef norm, dnorm;
    Combine combine = Combine::kSum;
    std::vector<Branch> branches;
    std::vector<size_t> backward_order;  // of branches: the first `summands` add to one gradient of the input
    int summands = 0;
    TensorRef x, normed;  // kept from forward: input, and with Recompute::kNone its norm
  };

  static Layer MakeLayer(const ModelSpec& spec, size_t index, const ParamStore& params);
  absl::Status ForShared(const std::function<absl::Status(int)>& hook) const;
  absl::StatusOr<TensorRef> Trunk(Context& ctx, ModelStep& step, ConstTensorRef tokens, Keep keep,
                                  const BucketHooks& hooks);
  LinearCrossEntropy LossArgs(Context& ctx, const ModelStep& step, ConstTensorRef normed,
                              ConstTensorRef targets) const;
  absl::Status HeadForwardBackward(Context& ctx, ModelStep& step, TensorRef x, ConstTensorRef targets,
                                   double loss_scale, TensorRef gradient, TensorRef loss);
  static absl::Status ShareForward(Context& ctx, const Layer& layer, ConstTensorRef normed, TensorRef y,
                                   SharedTokens& shared);
  static absl::Status ShareBackward(Context& ctx, const Layer& layer, ConstTensorRef normed,
                                    ConstTensorRef dy, TensorRef dnormed, SharedTokens& shared);
  absl::Status LayerForward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef x, Keep keep,
                            TensorRef y);
  absl::Status LayerBackward(Context& ctx, ModelStep& step, Layer& layer, TensorRef gradient);
  absl::Status AddMeanNorm(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef normed, Keep keep,
                           TensorRef y);
  absl::Status BranchesBackward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef normed,
                                ConstTensorRef dy, TensorRef dnormed);
  absl::Status BranchBackward(Context& ctx, ModelStep& step, Layer& layer, Branch& branch,
                              ConstTensorRef normed, ConstTensorRef dy, TensorRef dnormed);

  Recompute recompute_;
  double eps_;
  int64_t d_model_, vocab_size_;
  DType dtype_;
  bool tied_head_;
  TensorRef embed_, dembed_, final_norm_, dfinal_norm_, head_, dhead_;  // embed_: meta tokens' rows last
  std::pair<int64_t, int64_t> vocab_rows_;                              // [begin, end) of head_
  int64_t most_vocab_rows_;                                             // of any rank
  std::vector<int> shared_buckets_;
  std::vector<Layer> layers_;
};

}  // namespace annulus
