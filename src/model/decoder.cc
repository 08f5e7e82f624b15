#include "annulus/model/decoder.h"

#include "absl/strings/str_cat.h"
#include "annulus/device/trace.h"
#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/embedding.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"

namespace annulus {
namespace {

// [rows, batch, columns] as [tokens, columns], what the token-wise ops take.
template <typename Ref>
Ref Tokens(const Ref& t) {
  return t.Reshaped({t.dim(0) * t.dim(1), t.dim(2)});
}

absl::Status Call(const std::function<absl::Status(int)>& hook, int bucket) {
  return hook ? hook(bucket) : absl::OkStatus();
}

}  // namespace

Decoder::Decoder(const ModelSpec& spec, Recompute recompute, const ParamStore& params)
    : recompute_(recompute),
      eps_(spec.norm_eps),
      d_model_(spec.d_model),
      dtype_(params.dtype()),
      tied_head_(spec.tied_head) {
  const ParamTable& table = params.table();
  const int embed = table.IndexOf("embed.weight"), norm = table.IndexOf("final_norm.weight");
  const int head = spec.tied_head ? embed : table.IndexOf("head.weight");
  embed_ = params.Value(embed), dembed_ = params.Grad(embed);
  final_norm_ = params.Value(norm), dfinal_norm_ = params.Grad(norm);
  head_ = params.Value(head), dhead_ = params.Grad(head);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const int layer_norm = table.IndexOf(absl::StrCat("layers.", i, ".norm.weight"));
    Layer layer;
    const bool attends = spec.layers[i].kind == LayerKind::kAttention;
    const std::string name = absl::StrCat("layers.", i, attends ? ".attention" : ".mlp");
    layer.forward_name = name + " forward", layer.backward_name = name + " backward";
    layer.norm = params.Value(layer_norm), layer.dnorm = params.Grad(layer_norm);
    layer.mixer = attends ? MakeAttention(spec, i, recompute, params) : MakeMlp(spec, i, recompute, params);
    layers_.push_back(std::move(layer));
  }
}

absl::Status Decoder::LayerForward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef x, Keep keep,
                                   TensorRef y) {
  const TraceRange range(layer.forward_name);
  const bool keep_norm = keep == Keep::kForBackward && recompute_ == Recompute::kNone;
  if (keep_norm) layer.normed = ctx.saved.Allocate(dtype_, x.shape());
  ArenaScope scope(ctx.scratch);
  const TensorRef normed = keep_norm ? layer.normed : ctx.scratch.Allocate(dtype_, x.shape());
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, Tokens(x), layer.norm, eps_, Tokens(normed)));
  if (y.raw() != x.raw()) ANNULUS_RETURN_IF_ERROR(Copy(ctx, x, y));
  return layer.mixer->Forward(ctx, step, normed, keep, y);
}

// gradient: of the layer's output in, of its input out.
absl::Status Decoder::LayerBackward(Context& ctx, ModelStep& step, Layer& layer, TensorRef gradient) {
  const TraceRange range(layer.backward_name);
  ArenaScope scope(ctx.scratch);
  TensorRef normed = layer.normed;
  if (recompute_ != Recompute::kNone) {
    normed = ctx.scratch.Allocate(dtype_, layer.x.shape());
    ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, Tokens(layer.x), layer.norm, eps_, Tokens(normed)));
  }
  const TensorRef dnormed = ctx.scratch.Allocate(dtype_, layer.x.shape());
  ANNULUS_RETURN_IF_ERROR(layer.mixer->Backward(ctx, step, normed, gradient, dnormed));
  return RmsNormBackward(ctx, Tokens(layer.x), layer.norm, Tokens(dnormed), eps_, Tokens(gradient),
                         layer.dnorm);
}

// The residual stream after the last layer; without backward one buffer serves all layers.
absl::StatusOr<TensorRef> Decoder::Trunk(Context& ctx, ModelStep& step, ConstTensorRef tokens, Keep keep,
                                         const BucketHooks& hooks) {
  const TraceRange range("forward");
  const int64_t rows = step.geometry.layout().local_rows(), batch = step.geometry.sequences().batch;
  ANNULUS_CHECK(tokens.elements() == rows * batch) << ToString(tokens.shape());
  const Shape shape{rows, batch, d_model_};
  TensorRef x = ctx.saved.Allocate(dtype_, shape);
  int bucket = 0;
  ANNULUS_RETURN_IF_ERROR(Call(hooks.needed, bucket));
  ANNULUS_RETURN_IF_ERROR(EmbeddingForward(ctx, tokens, embed_, Tokens(x)));
  for (Layer& layer : layers_) {
    ANNULUS_RETURN_IF_ERROR(Call(hooks.needed, ++bucket));
    layer.x = x;
    const TensorRef y = keep == Keep::kForBackward ? ctx.saved.Allocate(dtype_, shape) : x;
    ANNULUS_RETURN_IF_ERROR(LayerForward(ctx, step, layer, x, keep, y));
    x = y;
  }
  ANNULUS_RETURN_IF_ERROR(Call(hooks.needed, ++bucket));
  return x;
}

absl::Status Decoder::Loss(Context& ctx, ModelStep& step, const TokenSlice& slice, const BucketHooks& hooks,
                           TensorRef loss) {
  ArenaScope saved(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef x, Trunk(ctx, step, slice.tokens, Keep::kNothing, hooks));
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, Tokens(x), final_norm_, eps_, Tokens(x)));
  return LinearCrossEntropyForward(ctx, {.x = Tokens(x), .w = head_, .targets = slice.targets}, loss);
}

// Adds the gradient of the trunk's output x to `gradient`.
absl::Status Decoder::HeadForwardBackward(Context& ctx, TensorRef x, ConstTensorRef targets,
                                          double loss_scale, TensorRef gradient, TensorRef loss) {
  const TraceRange range("head and loss");
  ArenaScope scope(ctx.scratch);
  const TensorRef normed = ctx.scratch.Allocate(dtype_, x.shape());
  const TensorRef dnormed = ctx.scratch.Allocate(dtype_, x.shape());
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, Tokens(x), final_norm_, eps_, Tokens(normed)));
  ANNULUS_RETURN_IF_ERROR(
      LinearCrossEntropyForwardBackward(ctx, {.x = Tokens(normed), .w = head_, .targets = targets},
                                        {.scale = loss_scale, .dx = Tokens(dnormed), .dw = dhead_}, loss));
  return RmsNormBackward(ctx, Tokens(x), final_norm_, Tokens(dnormed), eps_, Tokens(gradient), dfinal_norm_);
}

absl::Status Decoder::LossAndGradients(Context& ctx, ModelStep& step, const TokenSlice& slice,
                                       double loss_scale, const BucketHooks& hooks, TensorRef loss) {
  ArenaScope saved(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef x, Trunk(ctx, step, slice.tokens, Keep::kForBackward, hooks));
  const TraceRange range("backward");
  ArenaScope scope(ctx.scratch);
  const TensorRef gradient = ctx.scratch.Allocate(dtype_, x.shape());
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, gradient));
  const int last_bucket = static_cast<int>(layers_.size()) + 1;
  ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, last_bucket));
  if (tied_head_) ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, 0));
  ANNULUS_RETURN_IF_ERROR(HeadForwardBackward(ctx, x, slice.targets, loss_scale, gradient, loss));
  ANNULUS_RETURN_IF_ERROR(Call(hooks.done, last_bucket));
  for (int i = static_cast<int>(layers_.size()) - 1; i >= 0; --i) {
    ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, i + 1));
    ANNULUS_RETURN_IF_ERROR(LayerBackward(ctx, step, layers_[static_cast<size_t>(i)], gradient));
    ANNULUS_RETURN_IF_ERROR(Call(hooks.done, i + 1));
  }
  if (!tied_head_) ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, 0));
  ANNULUS_RETURN_IF_ERROR(EmbeddingBackward(ctx, slice.tokens, Tokens(gradient), dembed_));
  return Call(hooks.done, 0);
}

absl::Status Decoder::Logits(Context& ctx, ModelStep& step, ConstTensorRef tokens, TensorRef logits) {
  ArenaScope saved(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef x, Trunk(ctx, step, tokens, Keep::kNothing, {}));
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, Tokens(x), final_norm_, eps_, Tokens(x)));
  const TensorRef all = Tokens(x);
  return LinearForward(ctx, all.Rows(all.dim(0) - logits.dim(0), all.dim(0)), head_, Write::kOverwrite,
                       logits);
}

}  // namespace annulus
