#pragma once

// The decoder: embedding, residual branches as the pattern says, final RMSNorm, output head with chunked
// loss. Forward and backward are explicit; what is kept and what is recomputed is each layer's business
// (model/spec.h).

#include <functional>
#include <memory>
#include <vector>

#include "annulus/model/mixer.h"

namespace annulus {

// This rank's part of a micro-batch, ordered (row, batch item); its sequences and masks are in the geometry.
struct TokenSlice {
  absl::Span<const int32_t> tokens;   // [rows * batch]; padding rows hold any token
  absl::Span<const int32_t> targets;  // [rows * batch]; negative: not counted
};

class Decoder {
 public:
  // `params` must have been built for `spec` and must outlive the decoder.
  Decoder(const ModelSpec& spec, Recompute recompute, const ParamStore& params);

  // Sum of the loss over this rank's counted tokens, in nats.
  absl::StatusOr<double> Loss(Context& ctx, ModelStep& step, const TokenSlice& slice);

  // The same, and adds loss_scale * d(sum)/d(parameter) to every gradient. `bucket_done(bucket)` is called as
  // soon as a bucket's gradients are complete, in reverse order of the model.
  absl::StatusOr<double> LossAndGradients(
      Context& ctx, ModelStep& step, const TokenSlice& slice, double loss_scale,
      const std::function<absl::Status(int)>&
          bucket_done);  // Logits of this rank's last logits.dim(0) tokens: [n, vocab]. For sampling and
                         // tests: not in chunks.
  absl::Status Logits(Context& ctx, ModelStep& step, absl::Span<const int32_t> tokens, TensorRef logits);

 private:
  struct Layer {
    TensorRef norm, dnorm;
    std::unique_ptr<SequenceMixer> mixer;
    TensorRef x, normed;  // kept from forward: input, and with Recompute::kNone its norm
  };

  absl::StatusOr<TensorRef> Trunk(Context& ctx, ModelStep& step, absl::Span<const int32_t> tokens, Keep keep);
  absl::StatusOr<double> HeadForwardBackward(Context& ctx, TensorRef x, absl::Span<const int32_t> targets,
                                             double loss_scale, TensorRef gradient);
  absl::Status LayerForward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef x, Keep keep,
                            TensorRef y);
  absl::Status LayerBackward(Context& ctx, ModelStep& step, Layer& layer, TensorRef gradient);

  Recompute recompute_;
  double eps_;
  int64_t d_model_;
  DType dtype_;
  TensorRef embed_, dembed_, final_norm_, dfinal_norm_, head_, dhead_;
  std::vector<Layer> layers_;
};

}  // namespace annulus
