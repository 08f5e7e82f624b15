// MLP with a gate or without: y += h Wd^T, x [tokens / tp, d_model], inner width d_ff, split over the ranks.
//
//   kSwiglu        h = silu(x Wg^T) * (x Wu^T)
//   kReluSquared   h = relu(x Wu^T)^2

#include "annulus/model/mixer.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/relu_squared.h"
#include "annulus/ops/swiglu.h"

namespace annulus {
namespace {

class MlpMixer : public SequenceMixer {
 public:
  explicit MlpMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        activation_(args.spec.activation),
        d_ff_(args.spec.d_ff / args.shard.size) {
    const ParamTable& table = args.params.table();
    const std::string prefix = args.prefix();
    const int up = table.IndexOf(prefix + "up.weight"), down = table.IndexOf(prefix + "down.weight");
    const int first = gated() ? table.IndexOf(prefix + "gate.weight") : up;
    w_in_ = args.params.Values(first, up), dw_in_ = args.params.Grads(first, up);
    w_down_ = args.params.Value(down), dw_down_ = args.params.Grad(down);
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    saved_ = {};
    const bool keeping = keep == Keep::kForBackward;
    if (keeping && recompute_ == Recompute::kNone) saved_.h = AllocateH(ctx.saved, step, x);
    if (keeping && (recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise)) {
      saved_.in = AllocateIn(ctx.saved, step, x);
    }
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, step, x);
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all, w_in_, Write::kOverwrite, now.in));
    ANNULUS_RETURN_IF_ERROR(Activate(ctx, now));
    return step.tensor.RowParallelForward(ctx, now.h, w_down_, Write::kAccumulate, y);
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(PendingTokens gathering_dy, step.tensor.StartGather(ctx, dy));
    ANNULUS_ASSIGN_OR_RETURN(PendingTokens gathering_x, step.tensor.StartGather(ctx, x));
    const Activations now = WithScratch(ctx, step, x);
    const TensorRef dh = ctx.scratch.Allocate(x.dtype(), now.h.shape());
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_dy, gathering_dy.Finish(ctx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, all_dy, w_down_, Write::kOverwrite, dh));

    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_x, gathering_x.Finish(ctx));
    if (!saved_.in.defined()) {
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all_x, w_in_, Write::kOverwrite, now.in));
    }
    if (!saved_.h.defined()) ANNULUS_RETURN_IF_ERROR(Activate(ctx, now));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, all_dy, now.h, dw_down_));
    const TensorRef din = gated() ? ctx.scratch.Allocate(x.dtype(), now.in.shape()) : dh;
    ANNULUS_RETURN_IF_ERROR(gated() ? SwigluBackward(ctx, now.in, dh, din)
                                    : ReluSquaredBackward(ctx, now.in, dh, din));

    const TensorRef partial = step.tensor.Partial(ctx, dx);
    ANNULUS_RETURN_IF_ERROR(
        LinearBackwardInput(ctx, din, w_in_, step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
    ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, din, all_x, dw_in_));
    return sum.Finish(ctx);
  }

 private:
  // Of this rank's part of the inner width.
  struct Activations {
    TensorRef in, h;  // [tokens, 2 d_ff] or [tokens, d_ff], gate first; [tokens, d_ff]
  };

  bool gated() const { return activation_ == Activation::kSwiglu; }
  TensorRef AllocateIn(Arena& arena, const ModelStep& step, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {step.tokens(), gated() ? 2 * d_ff_ : d_ff_});
  }
  TensorRef AllocateH(Arena& arena, const ModelStep& step, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {step.tokens(), d_ff_});
  }
  // What was kept, with scratch memory in place of what was not.
  Activations WithScratch(Context& ctx, const ModelStep& step, ConstTensorRef x) const {
    Activations now = saved_;
    if (!now.in.defined()) now.in = AllocateIn(ctx.scratch, step, x);
    if (!now.h.defined()) now.h = AllocateH(ctx.scratch, step, x);
    return now;
  }
  absl::Status Activate(Context& ctx, const Activations& now) const {
    return gated() ? SwigluForward(ctx, now.in, now.h) : ReluSquaredForward(ctx, now.in, now.h);
  }

  Recompute recompute_;
  Activation activation_;
  int64_t d_ff_;
  TensorRef w_in_, w_down_, dw_in_, dw_down_;
  Activations saved_;  // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeMlp(const MixerArgs& args) { return std::make_unique<MlpMixer>(args); }

}  // namespace annulus
