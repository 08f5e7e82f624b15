// Grouped-query attention with rotary positions (or none) and an optional window.
//
//   q = RoPE(x Wq^T)   kv = [RoPE(x Wk^T) | x Wv^T]   out = softmax(q k^T / sqrt(head_dim)) v   y += out Wo^T
//
// Shapes: x [rows, batch, d_model]; q, out [rows, batch, heads * head_dim]; kv [rows, batch, 2 kv_heads *
// head_dim].

#include <cmath>

#include "absl/strings/str_cat.h"
#include "annulus/model/mixer.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rope.h"

namespace annulus {
namespace {

class AttentionMixer : public SequenceMixer {
 public:
  AttentionMixer(const ModelSpec& spec, size_t layer, Recompute recompute, const ParamStore& params)
      : recompute_(recompute),
        rope_theta_(spec.layers[layer].rope_theta),
        shape_{.heads = spec.heads,
               .kv_heads = spec.kv_heads,
               .head_dim = spec.head_dim,
               .v_head_dim = spec.head_dim,
               .window = spec.layers[layer].window,
               .scale = 1.0 / std::sqrt(static_cast<double>(spec.head_dim))} {
    const std::string prefix = absl::StrCat("layers.", layer, ".attention.");
    const int q = params.table().IndexOf(prefix + "q.weight");
    const int k = params.table().IndexOf(prefix + "k.weight");
    const int v = params.table().IndexOf(prefix + "v.weight");
    const int o = params.table().IndexOf(prefix + "o.weight");
    wq_ = params.Value(q), dwq_ = params.Grad(q);
    wkv_ = params.Values(k, v), dwkv_ = params.Grads(k, v);
    wo_ = params.Value(o), dwo_ = params.Grad(o);
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    const bool keeping = keep == Keep::kForBackward;
    saved_ = {};
    if (keeping && recompute_ != Recompute::kBlock) AllocateOutput(ctx.saved, x, &saved_);
    const bool projections = recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
    if (keeping && projections) AllocateProjections(ctx.saved, x, &saved_);
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, x);
    ANNULUS_RETURN_IF_ERROR(Project(ctx, step, x, now));
    ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, now));
    return LinearForward(ctx, now.out, wo_, Write::kAccumulate, y);
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, x);
    if (!saved_.q.defined()) ANNULUS_RETURN_IF_ERROR(Project(ctx, step, x, now));
    if (!saved_.out.defined()) ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, now));

    const TensorRef dout = ctx.scratch.Allocate(x.dtype(), now.out.shape());
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy, wo_, Write::kOverwrite, dout));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dy, now.out, dwo_));

    const TensorRef dq = ctx.scratch.Allocate(x.dtype(), now.q.shape());
    const TensorRef dkv = ctx.scratch.Allocate(x.dtype(), now.kv.shape());
    ANNULUS_RETURN_IF_ERROR(Timed(ctx, step, Pass::kBackward, [&] {
      return ContextAttentionBackward(
          ctx, step.geometry, shape_,
          {.q = now.q, .kv = now.kv, .out = now.out, .lse = now.lse, .dout = dout, .dq = dq, .dkv = dkv},
          &step.stats);
    }));
    ANNULUS_RETURN_IF_ERROR(ApplyRope(ctx, step, RopeDirection::kInverse, dq, dkv));

    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dq, wq_, Write::kOverwrite, dx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dkv, wkv_, Write::kAccumulate, dx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dq, x, dwq_));
    return LinearBackwardWeight(ctx, dkv, x, dwkv_);
  }

 private:
  struct Activations {
    TensorRef q, kv;     // after RoPE
    TensorRef out, lse;  // lse in the accumulator dtype
  };

  void AllocateProjections(Arena& arena, ConstTensorRef x, Activations* to) const {
    to->q = arena.Allocate(x.dtype(), {x.dim(0), x.dim(1), shape_.heads * shape_.head_dim});
    to->kv = arena.Allocate(x.dtype(), {x.dim(0), x.dim(1), KvColumns()});
  }
  void AllocateOutput(Arena& arena, ConstTensorRef x, Activations* to) const {
    to->out = arena.Allocate(x.dtype(), {x.dim(0), x.dim(1), shape_.heads * shape_.v_head_dim});
    to->lse = arena.Allocate(AccumOf(x.dtype()), {x.dim(0), x.dim(1), shape_.heads});
  }
  // What was kept, with scratch memory in place of what was not.
  Activations WithScratch(Context& ctx, ConstTensorRef x) const {
    Activations now = saved_;
    if (!now.q.defined()) AllocateProjections(ctx.scratch, x, &now);
    if (!now.out.defined()) AllocateOutput(ctx.scratch, x, &now);
    return now;
  }
  int64_t KvColumns() const { return shape_.kv_heads * (shape_.head_dim + shape_.v_head_dim); }

  absl::Status ApplyRope(Context& ctx, ModelStep& step, RopeDirection direction, TensorRef q,
                         TensorRef kv) const {
    if (!rope_theta_.has_value()) return absl::OkStatus();
    const ConstTensorRef positions = step.geometry.Positions(ctx);
    ANNULUS_RETURN_IF_ERROR(
        Rope(ctx, positions, *rope_theta_, direction, HeadsOf(q, 0, shape_.heads, shape_.head_dim)));
    return Rope(ctx, positions, *rope_theta_, direction, HeadsOf(kv, 0, shape_.kv_heads, shape_.head_dim));
  }

  absl::Status Project(Context& ctx, ModelStep& step, ConstTensorRef x, const Activations& to) const {
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wq_, Write::kOverwrite, to.q));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wkv_, Write::kOverwrite, to.kv));
    return ApplyRope(ctx, step, RopeDirection::kForward, to.q, to.kv);
  }

  absl::Status Attend(Context& ctx, ModelStep& step, const Activations& to) const {
    return Timed(ctx, step, Pass::kForward, [&] {
      return ContextAttentionForward(ctx, step.geometry, shape_,
                                     {.q = to.q, .kv = to.kv, .out = to.out, .lse = to.lse}, &step.stats);
    });
  }

  template <typename Fn>
  absl::Status Timed(Context& ctx, ModelStep& step, Pass pass, Fn&& attend) const {
    if (step.clocks == nullptr) return attend();
    SpanClock& clock = step.clocks->Of(shape_.window, pass);
    clock.Begin(ctx.stream());
    const absl::Status status = attend();
    clock.End(ctx.stream());
    return status;
  }

  Recompute recompute_;
  std::optional<double> rope_theta_;
  ContextAttentionShape shape_;
  TensorRef wq_, wkv_, wo_, dwq_, dwkv_, dwo_;
  Activations saved_;  // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeAttention(const ModelSpec& spec, size_t layer, Recompute recompute,
                                             const ParamStore& params) {
  return std::make_unique<AttentionMixer>(spec, layer, recompute, params);
}

}  // namespace annulus
