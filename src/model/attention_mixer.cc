// Grouped-query attention with rotary positions (or none) and an optional window.
//
//   q = RoPE(x Wq^T)   kv = [RoPE(x Wk^T) | x Wv^T]   out = softmax(q k^T / sqrt(head_dim)) v   y += out Wo^T
//
// RoPE turns the last rotary_dim elements of each head. A model that turns others is this one with the rows
// of Wq and Wk of a head in another order.
//
// Shapes: x [tokens / tp, d_model]; q, out [rows, batch, heads * head_dim]; kv [rows, batch, 2 kv_heads *
// head_dim], of this tensor-parallel rank's heads. Where KV heads are fewer than ranks, each rank computes
// the one that its queries see, and its gradient is a summand.
//
// A layer may take the keys and values of an earlier one. That one keeps them, whatever the policy, and in
// backward comes after all who took them: they have left their gradients with it.

#include <algorithm>
#include <cmath>

#include "annulus/model/mixer.h"
#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "model_rope.h"
#include "timed_attention.h"

namespace annulus {
namespace {

// Whether a later layer takes the keys and values of this one.
bool IsTakenFrom(const ModelSpec& spec, size_t layer) {
  for (size_t later = layer + 1; later < spec.layers.size(); ++later) {
    for (const BranchSpec& branch : spec.layers[later].branches) {
      const auto back = static_cast<size_t>(branch.kv_layers_back);
      if (branch.kind == BranchKind::kAttention && later - back == layer) return true;
    }
  }
  return false;
}

ContextAttentionShape ShapeOf(const MixerArgs& args) {
  const ModelSpec& spec = args.spec;
  return {.heads = spec.heads / args.shard.size,
          .kv_heads = std::max<int64_t>(1, spec.kv_heads / args.shard.size),
          .head_dim = spec.head_dim,
          .v_head_dim = spec.head_dim,
          .window = args.branch_spec().window,
          .scale = 1.0 / std::sqrt(static_cast<double>(spec.head_dim))};
}

int64_t RotaryDim(const ModelSpec& spec) { return spec.rotary_dim > 0 ? spec.rotary_dim : spec.head_dim; }

class AttentionMixer : public SequenceMixer {
 public:
  explicit AttentionMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        rope_(RopeOf(args.spec, args.branch_spec(), RotaryDim(args.spec))),
        shape_(ShapeOf(args)),
        layer_(args.layer),
        kv_layer_(args.layer - static_cast<size_t>(args.branch_spec().kv_layers_back)),
        taken_from_(IsTakenFrom(args.spec, args.layer)) {
    const ParamTable& table = args.params.table();
    const std::string prefix = args.prefix();
    const int q = table.IndexOf(prefix + "q.weight"), o = table.IndexOf(prefix + "o.weight");
    wq_ = args.params.Value(q), dwq_ = args.params.Grad(q);
    wo_ = args.params.Value(o), dwo_ = args.params.Grad(o);
    if (!takes()) FindKvWeights(args, table.IndexOf(prefix + "k.weight"), table.IndexOf(prefix + "v.weight"));
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    const bool keeping = keep == Keep::kForBackward;
    saved_ = {};
    if (keeping && recompute_ != Recompute::kBlock) AllocateOutput(ctx.saved, step, x, &saved_);
    const bool projections = recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
    if (keeping && projections) saved_.q = AllocateQ(ctx.saved, step, x);
    const bool keep_kv = !takes() && keeping && projections;
    if (keep_kv || taken_from_) saved_.kv = AllocateKv(ctx.saved, step, x.dtype());
    if (taken_from_) ANNULUS_RETURN_IF_ERROR(Offer(ctx, step, keep));
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, step, x);
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_RETURN_IF_ERROR(ProjectQ(ctx, step, all, now.q));
    if (!takes()) ANNULUS_RETURN_IF_ERROR(ProjectKv(ctx, step, all, now.kv));
    ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, now));
    return step.tensor.RowParallelForward(ctx, now.out, wo_, Write::kAccumulate, y);
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(PendingTokens gathering_dy, step.tensor.StartGather(ctx, dy));
    ANNULUS_ASSIGN_OR_RETURN(PendingTokens gathering_x, step.tensor.StartGather(ctx, x));
    const Activations now = WithScratch(ctx, step, x);
    const TensorRef dout = ctx.scratch.Allocate(x.dtype(), now.out.shape());
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_dy, gathering_dy.Finish(ctx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, all_dy, wo_, Write::kOverwrite, dout));

    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_x, gathering_x.Finish(ctx));
    if (!saved_.q.defined()) ANNULUS_RETURN_IF_ERROR(ProjectQ(ctx, step, all_x, now.q));
    if (!saved_.kv.defined() && !takes()) ANNULUS_RETURN_IF_ERROR(ProjectKv(ctx, step, all_x, now.kv));
    if (!saved_.out.defined()) ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, now));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, all_dy, now.out, dwo_));

    const TensorRef dq = ctx.scratch.Allocate(x.dtype(), now.q.shape());
    const TensorRef dkv = ctx.scratch.Allocate(x.dtype(), now.kv.shape());
    ANNULUS_RETURN_IF_ERROR(AttendBackward(ctx, step, now, dout, dq, dkv));
    ANNULUS_RETURN_IF_ERROR(ApplyRope(ctx, step, RopeDirection::kGradient, dq, shape_.heads));
    return ProjectBackward(ctx, step, all_x, dq, dkv, dx);
  }

 private:
  struct Activations {
    TensorRef q, kv;     // after RoPE
    TensorRef out, lse;  // lse in the accumulator dtype
  };
  // A product that makes columns of kv, from `column` on.
  struct KvWeight {
    int64_t column;
    TensorRef w, dw;
  };

  bool takes() const { return kv_layer_ != layer_; }
  int64_t KvColumns() const { return shape_.kv_heads * (shape_.head_dim + shape_.v_head_dim); }

  void FindKvWeights(const MixerArgs& args, int k, int v) {
    const ParamStore& params = args.params;
    const int64_t rows = shape_.kv_heads * shape_.head_dim;
    if (params.Value(k).dim(0) == rows) {
      kv_weights_ = {{0, params.Values(k, v), params.Grads(k, v)}};
      return;
    }
    const int64_t first = args.shard.rank * args.spec.kv_heads / args.shard.size * shape_.head_dim;
    const auto own = [&](TensorRef all) { return all.Rows(first, first + rows); };
    kv_weights_ = {{0, own(params.Value(k)), own(params.Grad(k))},
                   {rows, own(params.Value(v)), own(params.Grad(v))}};
  }

  TensorRef AllocateQ(Arena& arena, const ModelStep& step, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {step.rows(), step.batch(), shape_.heads * shape_.head_dim});
  }
  TensorRef AllocateKv(Arena& arena, const ModelStep& step, DType dtype) const {
    return arena.Allocate(dtype, {step.rows(), step.batch(), KvColumns()});
  }
  void AllocateOutput(Arena& arena, const ModelStep& step, ConstTensorRef x, Activations* to) const {
    to->out = arena.Allocate(x.dtype(), {step.rows(), step.batch(), shape_.heads * shape_.v_head_dim});
    to->lse = arena.Allocate(AccumOf(x.dtype()), {step.rows(), step.batch(), shape_.heads});
  }
  // What was kept or taken, with scratch memory in place of what was not.
  Activations WithScratch(Context& ctx, const ModelStep& step, ConstTensorRef x) const {
    Activations now = saved_;
    if (!now.q.defined()) now.q = AllocateQ(ctx.scratch, step, x);
    if (takes()) now.kv = step.shared_kv.at(kv_layer_).kv;
    if (!now.kv.defined()) now.kv = AllocateKv(ctx.scratch, step, x.dtype());
    if (!now.out.defined()) AllocateOutput(ctx.scratch, step, x, &now);
    return now;
  }

  // Keys and values for later layers.
  absl::Status Offer(Context& ctx, ModelStep& step, Keep keep) const {
    SharedKv& shared = step.shared_kv[layer_];
    shared = {.kv = saved_.kv, .dkv = {}};
    if (keep == Keep::kNothing) return absl::OkStatus();
    shared.dkv = AllocateKv(ctx.saved, step, AccumOf(saved_.kv.dtype()));
    return Zero(ctx, shared.dkv);
  }

  absl::Status ApplyRope(Context& ctx, ModelStep& step, RopeDirection direction, TensorRef x,
                         int64_t heads) const {
    if (!rope_.has_value()) return absl::OkStatus();
    return Rope(ctx, step.geometry.Positions(ctx), *rope_, direction, HeadsOf(x, 0, heads, shape_.head_dim),
                shape_.head_dim - 2 * rope_->pairs());
  }

  absl::Status ProjectQ(Context& ctx, ModelStep& step, ConstTensorRef x, TensorRef q) const {
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wq_, Write::kOverwrite, q));
    return ApplyRope(ctx, step, RopeDirection::kForward, q, shape_.heads);
  }

  static MatrixRef ColumnsOf(const KvWeight& weight, TensorRef kv) {
    return MatrixRef(kv).Cols(weight.column, weight.column + weight.w.dim(0));
  }
  absl::Status ProjectKv(Context& ctx, ModelStep& step, ConstTensorRef x, TensorRef kv) const {
    for (const KvWeight& weight : kv_weights_) {
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, weight.w, Write::kOverwrite, ColumnsOf(weight, kv)));
    }
    return ApplyRope(ctx, step, RopeDirection::kForward, kv, shape_.kv_heads);
  }

  // dkv in: of this layer's queries.
  absl::Status ProjectBackward(Context& ctx, ModelStep& step, ConstTensorRef all_x, TensorRef dq,
                               TensorRef dkv, TensorRef dx) const {
    if (takes() || taken_from_) {
      const TensorRef sum = step.shared_kv.at(kv_layer_).dkv;
      const ColumnRun all{.from = 0, .to = 0, .columns = KvColumns()};
      ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, dkv, {&all, 1}, Write::kAccumulate, sum));
      if (taken_from_) ANNULUS_RETURN_IF_ERROR(Cast(ctx, sum, dkv));
    }
    const TensorRef partial = step.tensor.Partial(ctx, dx);
    ANNULUS_RETURN_IF_ERROR(
        LinearBackwardInput(ctx, dq, wq_, step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
    if (!takes()) {
      ANNULUS_RETURN_IF_ERROR(ApplyRope(ctx, step, RopeDirection::kGradient, dkv, shape_.kv_heads));
    }
    for (const KvWeight& weight : kv_weights_) {
      ANNULUS_RETURN_IF_ERROR(
          LinearBackwardInput(ctx, ColumnsOf(weight, dkv), weight.w, Write::kAccumulate, partial));
    }
    ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dq, all_x, dwq_));
    for (const KvWeight& weight : kv_weights_) {
      ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, ColumnsOf(weight, dkv), all_x, weight.dw));
    }
    return sum.Finish(ctx);
  }

  absl::Status Attend(Context& ctx, ModelStep& step, const Activations& to) const {
    return Timed(ctx, step, {.window = shape_.window}, Pass::kForward, [&] {
      return ContextAttentionForward(ctx, step.geometry, shape_,
                                     {.q = to.q, .kv = to.kv, .out = to.out, .lse = to.lse}, &step.stats);
    });
  }
  absl::Status AttendBackward(Context& ctx, ModelStep& step, const Activations& now, TensorRef dout,
                              TensorRef dq, TensorRef dkv) const {
    return Timed(ctx, step, {.window = shape_.window}, Pass::kBackward, [&] {
      return ContextAttentionBackward(
          ctx, step.geometry, shape_,
          {.q = now.q, .kv = now.kv, .out = now.out, .lse = now.lse, .dout = dout, .dq = dq, .dkv = dkv},
          &step.stats);
    });
  }

  Recompute recompute_;
  std::optional<RopeFrequencies> rope_;
  ContextAttentionShape shape_;
  size_t layer_, kv_layer_;
  bool taken_from_;
  TensorRef wq_, wo_, dwq_, dwo_;
  std::vector<KvWeight> kv_weights_;  // none where keys and values are taken
  Activations saved_;                 // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeAttention(const MixerArgs& args) {
  return std::make_unique<AttentionMixer>(args);
}

}  // namespace annulus
