#include "annulus/model/decoder.h"

#include <algorithm>

#include "absl/strings/str_join.h"
#include "annulus/device/trace.h"
#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/embedding.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"

namespace annulus {
namespace {

absl::Status Call(const std::function<absl::Status(int)>& hook, int bucket) {
  return hook ? hook(bucket) : absl::OkStatus();
}

const ParamInfo& InfoOf(const ParamTable& table, absl::string_view name) {
  return table.params[static_cast<size_t>(table.IndexOf(name))];
}

// Stats of the whole vocabulary from those of this rank's part.
absl::Status CombineStats(Context& ctx, const TensorParallel& tensor, TensorRef stats) {
  ArenaScope scope(ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef parts, tensor.Gather(ctx, stats));
  return MergeVocabularyStats(ctx, parts.Reshaped({tensor.size(), stats.dim(0), 2}), stats);
}

}  // namespace

std::vector<int32_t> LocalTokens(const ModelSpec& spec, const ParamTable& table,
                                 absl::Span<const int32_t> tokens) {
  const auto [begin, end] = InfoOf(table, "embed.weight").parts[0];
  const int64_t meta_rows = spec.meta_tokens > 0 ? InfoOf(table, "meta.weight").shape[0] : 0;
  std::vector<int32_t> rows;
  rows.reserve(tokens.size());
  for (const int32_t token : tokens) {
    ANNULUS_CHECK(0 <= token && token < spec.vocab_size + spec.meta_tokens) << "token " << token;
    const int64_t meta = token - spec.vocab_size;
    int64_t row = -1;
    if (begin <= token && token < end) row = token - begin;
    if (0 <= meta && meta < meta_rows) row = end - begin + meta;
    rows.push_back(static_cast<int32_t>(row));
  }
  return rows;
}

SequenceBatch WithMetaTokens(const ModelSpec& spec, SequenceBatch sequences) {
  const int64_t meta = spec.meta_tokens;
  if (meta == 0) return sequences;
  for (int64_t& length : sequences.lengths) length += meta;
  for (std::vector<int64_t>& starts : sequences.document_starts) {
    for (int64_t& start : starts) start = start == 0 ? 0 : start + meta;
    starts.insert(starts.begin(), static_cast<size_t>(meta), 0);
  }
  return sequences;
}

Decoder::Decoder(const ModelSpec& spec, Recompute recompute, const ParamStore& params, TensorShard shard)
    : recompute_(recompute),
      eps_(spec.norm_eps),
      d_model_(spec.d_model),
      vocab_size_(spec.vocab_size),
      dtype_(params.dtype()),
      tied_head_(spec.tied_head) {
  const ParamTable& table = params.table();
  const int embed = table.IndexOf("embed.weight"), norm = table.IndexOf("final_norm.weight");
  const int meta = spec.meta_tokens > 0 ? table.IndexOf("meta.weight") : embed;
  const int head = spec.tied_head ? embed : table.IndexOf("head.weight");
  embed_ = params.Values(embed, meta), dembed_ = params.Grads(embed, meta);
  final_norm_ = params.Value(norm), dfinal_norm_ = params.Grad(norm);
  head_ = params.Value(head), dhead_ = params.Grad(head);
  vocab_rows_ = table.params[static_cast<size_t>(head)].parts[0];
  most_vocab_rows_ = (vocab_size_ + shard.size - 1) / shard.size;
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    if (table.buckets[static_cast<size_t>(bucket)].use == BucketUse::kShared)
      shared_buckets_.push_back(bucket);
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    Layer layer = MakeLayer(spec, i, params);
    for (size_t b = 0; b < layer.branches.size(); ++b) {
      layer.branches[b].mixer = MakeMixer(
          {.spec = spec, .layer = i, .branch = b, .recompute = recompute, .params = params, .shard = shard});
    }
    layers_.push_back(std::move(layer));
  }
}

// All but the mixers.
Decoder::Layer Decoder::MakeLayer(const ModelSpec& spec, size_t index, const ParamStore& params) {
  const ParamTable& table = params.table();
  const LayerSpec& from = spec.layers[index];
  Layer layer;
  layer.combine = from.combine;
  const int layer_norm = table.IndexOf(absl::StrCat("layers.", index, ".norm.weight"));
  layer.norm = params.Value(layer_norm), layer.dnorm = params.Grad(layer_norm);
  std::vector<std::string> names;
  for (size_t b = 0; b < from.branches.size(); ++b) {
    const BranchSpec& of = from.branches[b];
    names.push_back(Name(of.kind));
    // Latent attention's gradient is of this rank's tokens already, for the most part.
    const bool last = of.kind == BranchKind::kLatentAttention;
    layer.backward_order.insert(last ? layer.backward_order.end() : layer.backward_order.begin(), b);
    layer.summands += last ? 0 : 1;
    Branch& branch = layer.branches.emplace_back();
    if (from.combine == Combine::kSum) continue;
    const int norm = table.IndexOf(absl::StrCat("layers.", index, ".combine.", Name(of.kind), ".weight"));
    branch.norm = params.Value(norm), branch.dnorm = params.Grad(norm);
  }
  const std::string name = absl::StrCat("layers.", index, ".", absl::StrJoin(names, "+"));
  layer.forward_name = name + " forward", layer.backward_name = name + " backward";
  return layer;
}

absl::Status Decoder::ForShared(const std::function<absl::Status(int)>& hook) const {
  for (const int bucket : shared_buckets_) ANNULUS_RETURN_IF_ERROR(Call(hook, bucket));
  return absl::OkStatus();
}

// y += the mean over branches of norm(branch(normed)).
absl::Status Decoder::AddMeanNorm(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef normed,
                                  Keep keep, TensorRef y) {
  for (Branch& branch : layer.branches) {
    if (keep == Keep::kForBackward) branch.out = ctx.saved.Allocate(dtype_, y.shape());
    ArenaScope scope(ctx.scratch);
    const TensorRef out = keep == Keep::kForBackward ? branch.out : ctx.scratch.Allocate(dtype_, y.shape());
    const TensorRef added = ctx.scratch.Allocate(dtype_, y.shape());
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, out));
    ANNULUS_RETURN_IF_ERROR(branch.mixer->Forward(ctx, step, normed, keep, out));
    ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, out, branch.norm, eps_, added));
    ANNULUS_RETURN_IF_ERROR(Scale(ctx, 1.0 / static_cast<double>(layer.branches.size()), added));
    ANNULUS_RETURN_IF_ERROR(AddInPlace(ctx, added, y));
  }
  return absl::OkStatus();
}

// Branches side by side have their input in common and, where they are summed, what they add to.
absl::Status Decoder::ShareForward(Context& ctx, const Layer& layer, ConstTensorRef normed, TensorRef y,
                                   SharedTokens& shared) {
  if (layer.branches.size() == 1) return absl::OkStatus();
  if (layer.combine == Combine::kSum) shared.Sum(ctx, y, static_cast<int>(layer.branches.size()));
  return shared.Gather(ctx, normed);
}

absl::Status Decoder::ShareBackward(Context& ctx, const Layer& layer, ConstTensorRef normed,
                                    ConstTensorRef dy, TensorRef dnormed, SharedTokens& shared) {
  if (layer.branches.size() == 1) return absl::OkStatus();
  if (layer.summands > 1) shared.Sum(ctx, dnormed, layer.summands);
  if (layer.combine == Combine::kSum) ANNULUS_RETURN_IF_ERROR(shared.Gather(ctx, dy));
  return shared.Gather(ctx, normed);
}

absl::Status Decoder::LayerForward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef x, Keep keep,
                                   TensorRef y) {
  const TraceRange range(layer.forward_name);
  const bool keep_norm = keep == Keep::kForBackward && recompute_ == Recompute::kNone;
  if (keep_norm) layer.normed = ctx.saved.Allocate(dtype_, x.shape());
  ArenaScope scope(ctx.scratch);
  const TensorRef normed = keep_norm ? layer.normed : ctx.scratch.Allocate(dtype_, x.shape());
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, x, layer.norm, eps_, normed));
  if (y.raw() != x.raw()) ANNULUS_RETURN_IF_ERROR(Copy(ctx, x, y));
  SharedTokens shared(step.tensor);
  ANNULUS_RETURN_IF_ERROR(ShareForward(ctx, layer, normed, y, shared));
  if (layer.combine == Combine::kMeanNorm) return AddMeanNorm(ctx, step, layer, normed, keep, y);
  for (Branch& branch : layer.branches) {
    ANNULUS_RETURN_IF_ERROR(branch.mixer->Forward(ctx, step, normed, keep, y));
  }
  return absl::OkStatus();
}

// dnormed: overwritten, or a summand of what branches share.
absl::Status Decoder::BranchBackward(Context& ctx, ModelStep& step, Layer& layer, Branch& branch,
                                     ConstTensorRef normed, ConstTensorRef dy, TensorRef dnormed) {
  if (layer.combine == Combine::kSum) return branch.mixer->Backward(ctx, step, normed, dy, dnormed);
  ArenaScope scope(ctx.scratch);
  const TensorRef share = ctx.scratch.Allocate(dtype_, dy.shape());
  const TensorRef dout = ctx.scratch.Allocate(dtype_, dy.shape());
  ANNULUS_RETURN_IF_ERROR(Copy(ctx, dy, share));
  ANNULUS_RETURN_IF_ERROR(Scale(ctx, 1.0 / static_cast<double>(layer.branches.size()), share));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, dout));
  ANNULUS_RETURN_IF_ERROR(RmsNormBackward(ctx, branch.out, branch.norm, share, eps_, dout, branch.dnorm));
  return branch.mixer->Backward(ctx, step, normed, dout, dnormed);
}

// dnormed is overwritten. dy: of the layer's output.
absl::Status Decoder::BranchesBackward(Context& ctx, ModelStep& step, Layer& layer, ConstTensorRef normed,
                                       ConstTensorRef dy, TensorRef dnormed) {
  SharedTokens shared(step.tensor);
  ANNULUS_RETURN_IF_ERROR(ShareBackward(ctx, layer, normed, dy, dnormed, shared));
  const size_t together = static_cast<size_t>(std::max(layer.summands, 1));
  for (size_t n = 0; n < layer.branches.size(); ++n) {
    Branch& branch = layer.branches[layer.backward_order[n]];
    if (n < together) {
      ANNULUS_RETURN_IF_ERROR(BranchBackward(ctx, step, layer, branch, normed, dy, dnormed));
      continue;
    }
    ArenaScope of_branch(ctx.scratch);
    const TensorRef more = ctx.scratch.Allocate(dtype_, dnormed.shape());
    ANNULUS_RETURN_IF_ERROR(BranchBackward(ctx, step, layer, branch, normed, dy, more));
    ANNULUS_RETURN_IF_ERROR(AddInPlace(ctx, more, dnormed));
  }
  return absl::OkStatus();
}

// gradient: of the layer's output in, of its input out.
absl::Status Decoder::LayerBackward(Context& ctx, ModelStep& step, Layer& layer, TensorRef gradient) {
  const TraceRange range(layer.backward_name);
  ArenaScope scope(ctx.scratch);
  TensorRef normed = layer.normed;
  if (recompute_ != Recompute::kNone) {
    normed = ctx.scratch.Allocate(dtype_, layer.x.shape());
    ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, layer.x, layer.norm, eps_, normed));
  }
  const TensorRef dnormed = ctx.scratch.Allocate(dtype_, layer.x.shape());
  ANNULUS_RETURN_IF_ERROR(BranchesBackward(ctx, step, layer, normed, gradient, dnormed));
  return RmsNormBackward(ctx, layer.x, layer.norm, dnormed, eps_, gradient, layer.dnorm);
}

absl::Status Decoder::Embed(Context& ctx, ModelStep& step, ConstTensorRef tokens, TensorRef x) {
  ArenaScope scope(ctx.scratch);
  const TensorRef partial = step.tensor.Partial(ctx, x);
  ANNULUS_RETURN_IF_ERROR(EmbeddingForward(ctx, tokens, embed_, partial));
  ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, x));
  return sum.Finish(ctx);
}

absl::Status Decoder::Advance(Context& ctx, ModelStep& step, size_t layer, TensorRef x) {
  return LayerForward(ctx, step, layers_[layer], x, Keep::kNothing, x);
}

absl::Status Decoder::NormedInput(Context& ctx, size_t layer, ConstTensorRef x, TensorRef normed) const {
  return RmsNormForward(ctx, x, layers_[layer].norm, eps_, normed);
}

// The residual stream after the last layer; without backward one buffer serves all layers.
absl::StatusOr<TensorRef> Decoder::Trunk(Context& ctx, ModelStep& step, ConstTensorRef tokens, Keep keep,
                                         const BucketHooks& hooks) {
  const TraceRange range("forward");
  ANNULUS_CHECK(tokens.elements() == step.tokens()) << ToString(tokens.shape());
  const Shape shape{step.tokens() / step.tensor.size(), d_model_};
  TensorRef x = ctx.saved.Allocate(dtype_, shape);
  int bucket = 0;
  ANNULUS_RETURN_IF_ERROR(Call(hooks.needed, bucket));
  ANNULUS_RETURN_IF_ERROR(ForShared(hooks.needed));
  ANNULUS_RETURN_IF_ERROR(Embed(ctx, step, tokens, x));
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

// What the head and its loss are computed from; `normed` has been gathered.
LinearCrossEntropy Decoder::LossArgs(Context& ctx, const ModelStep& step, ConstTensorRef normed,
                                     ConstTensorRef targets) const {
  LinearCrossEntropy args{.x = normed, .w = head_, .targets = targets};
  if (step.tensor.size() == 1) return args;
  // Ranks of unequal parts must take equal chunks.
  if (ctx.device.kind == DeviceKind::kCpu)
    args.chunk_tokens = CpuLossChunkTokens(kLossChunkTokens, most_vocab_rows_);
  args.part = {.begin = vocab_rows_.first,
               .combine = [&](TensorRef stats) { return CombineStats(ctx, step.tensor, stats); }};
  return args;
}

absl::Status Decoder::Loss(Context& ctx, ModelStep& step, const TokenSlice& slice, const BucketHooks& hooks,
                           TensorRef loss) {
  ArenaScope saved(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef x, Trunk(ctx, step, slice.tokens, Keep::kNothing, hooks));
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, x, final_norm_, eps_, x));
  ArenaScope scope(ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef normed, step.tensor.Gather(ctx, x));
  return LinearCrossEntropyForward(ctx, LossArgs(ctx, step, normed, slice.targets), loss);
}

// Adds the gradient of the trunk's output x to `gradient`.
absl::Status Decoder::HeadForwardBackward(Context& ctx, ModelStep& step, TensorRef x, ConstTensorRef targets,
                                          double loss_scale, TensorRef gradient, TensorRef loss) {
  const TraceRange range("head and loss");
  ArenaScope scope(ctx.scratch);
  const TensorRef normed = ctx.scratch.Allocate(dtype_, x.shape());
  const TensorRef dnormed = ctx.scratch.Allocate(dtype_, x.shape());
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, x, final_norm_, eps_, normed));
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, normed));
  const TensorRef partial = step.tensor.Partial(ctx, dnormed);
  ANNULUS_RETURN_IF_ERROR(LinearCrossEntropyForwardBackward(
      ctx, LossArgs(ctx, step, all, targets), {.scale = loss_scale, .dx = partial, .dw = dhead_}, loss));
  ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dnormed));
  ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
  return RmsNormBackward(ctx, x, final_norm_, dnormed, eps_, gradient, dfinal_norm_);
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
  ANNULUS_RETURN_IF_ERROR(HeadForwardBackward(ctx, step, x, slice.targets, loss_scale, gradient, loss));
  ANNULUS_RETURN_IF_ERROR(Call(hooks.done, last_bucket));
  ANNULUS_RETURN_IF_ERROR(ForShared(hooks.begun));
  for (int i = static_cast<int>(layers_.size()) - 1; i >= 0; --i) {
    ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, i + 1));
    ANNULUS_RETURN_IF_ERROR(LayerBackward(ctx, step, layers_[static_cast<size_t>(i)], gradient));
    ANNULUS_RETURN_IF_ERROR(Call(hooks.done, i + 1));
  }
  ANNULUS_RETURN_IF_ERROR(ForShared(hooks.done));
  if (!tied_head_) ANNULUS_RETURN_IF_ERROR(Call(hooks.begun, 0));
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, gradient));
  ANNULUS_RETURN_IF_ERROR(EmbeddingBackward(ctx, slice.tokens, all, dembed_));
  return Call(hooks.done, 0);
}

absl::Status Decoder::Logits(Context& ctx, ModelStep& step, ConstTensorRef tokens, int64_t first,
                             TensorRef logits) {
  ArenaScope saved(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef x, Trunk(ctx, step, tokens, Keep::kNothing, {}));
  ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, x, final_norm_, eps_, x));
  ArenaScope scope(ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
  // Each rank fills its columns; the others' are zero.
  if (step.tensor.size() > 1) ANNULUS_RETURN_IF_ERROR(Zero(ctx, logits));
  ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all.Rows(first, first + logits.dim(0)), head_, Write::kOverwrite,
                                        MatrixRef(logits).Cols(vocab_rows_.first, vocab_rows_.second)));
  return step.tensor.AllReduce(logits);
}

}  // namespace annulus
