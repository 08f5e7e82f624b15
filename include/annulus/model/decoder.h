#pragma once

// The decoder: embedding, residual branches as the pattern says, final RMSNorm, output head with chunked
// loss. Forward and backward are explicit; what is kept and what is recomputed is each layer's business
// (model/spec.h).

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "annulus/model/mixer.h"

namespace annulus {

// This rank's part of a micro-batch, ordered (row, batch item), on the context's device; its sequences and
// masks are in the geometry.
struct TokenSlice {
  ConstTensorRef tokens;   // i32 [rows * batch]; padding rows hold any token
  ConstTensorRef targets;  // i32 [rows * batch]; negative: not counted
};

// Calls around the use of a bucket of parameters; either may be empty.
struct BucketHooks {
  std::function<absl::Status(int)> needed;  // before a pass first reads the bucket's values, in order
  std::function<absl::Status(int)> begun;   // before a pass first adds to its gradients
  std::function<absl::Status(int)> done;    // as soon as its gradients are complete, in reverse order
};

class Decoder {
 public:
  // `params` must have been built for `spec` and must outlive the decoder.
  Decoder(const ModelSpec& spec, Recompute recompute, const ParamStore& params);

  // loss += sum of the loss over this rank's counted tokens, in nats.   loss: f64 [1]
  absl::Status Loss(Context& ctx, ModelStep& step, const TokenSlice& slice, const BucketHooks& hooks,
                    TensorRef loss);

  // The same, and adds loss_scale * d(sum)/d(parameter) to every gradient.
  absl::Status LossAndGradients(Context& ctx, ModelStep& step, const TokenSlice& slice, double loss_scale,
                                const BucketHooks& hooks, TensorRef loss);

  // Logits of this rank's last logits.dim(0) tokens: [n, vocab]. For sampling and tests: not in chunks.
  absl::Status Logits(Context& ctx, ModelStep& step, ConstTensorRef tokens, TensorRef logits);

 private:
  struct Layer {
    std::string forward_name, backward_name;  // in a profiler's timeline: "layers.3.attention backward"
    TensorRef norm, dnorm;
    std::unique_ptr<SequenceMixer> mixer;
    TensorRef x, normed;  // kept from forward: input, and with Recompute::kNone its norm
  };

  absl::StatusOr<TensorRef> Trunk(Context& ctx, ModelStep& step, ConstTensorRef tokens, Keep keep,
                                  const BucketHooks& hooks);
  absl::Status HeadForwardBackward(Context& ctx, TensorRef x, ConstTensorRef targets, double loss_scale,
                                   TensorRef gradient, TensorRef loss);
  absl::Status LayerForward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef x, Keep keep,
                            TensorRef y);
  absl::Status LayerBackward(Context& ctx, ModelStep& step, Layer& layer, TensorRef gradient);

  Recompute recompute_;
  double eps_;
  int64_t d_model_;
  DType dtype_;
  bool tied_head_;
  TensorRef embed_, dembed_, final_norm_, dfinal_norm_, head_, dhead_;
  std::vector<Layer> layers_;
};

}  // namespace annulus
