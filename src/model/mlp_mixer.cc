// SwiGLU MLP: y += (silu(x Wg^T) * (x Wu^T)) Wd^T. x [rows, batch, d_model], inner width d_ff.

#include "absl/strings/str_cat.h"
#include "annulus/model/mixer.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/swiglu.h"

namespace annulus {
namespace {

class MlpMixer : public SequenceMixer {
 public:
  MlpMixer(const ModelSpec& spec, size_t layer, Recompute recompute, const ParamStore& params)
      : recompute_(recompute), d_ff_(spec.d_ff) {
    const std::string prefix = absl::StrCat("layers.", layer, ".mlp.");
    const int gate = params.table().IndexOf(prefix + "gate.weight");
    const int up = params.table().IndexOf(prefix + "up.weight");
    const int down = params.table().IndexOf(prefix + "down.weight");
    w_in_ = params.Values(gate, up), dw_in_ = params.Grads(gate, up);
    w_down_ = params.Value(down), dw_down_ = params.Grad(down);
  }

  absl::Status Forward(Context& ctx, ModelStep&, ConstTensorRef x, Keep keep, TensorRef y) override {
    saved_ = {};
    const bool keeping = keep == Keep::kForBackward;
    if (keeping && recompute_ == Recompute::kNone) saved_.h = AllocateH(ctx.saved, x);
    if (keeping && (recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise)) {
      saved_.gate_up = AllocateGateUp(ctx.saved, x);
    }
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, x);
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w_in_, Write::kOverwrite, now.gate_up));
    ANNULUS_RETURN_IF_ERROR(SwigluForward(ctx, now.gate_up, now.h));
    return LinearForward(ctx, now.h, w_down_, Write::kAccumulate, y);
  }

  absl::Status Backward(Context& ctx, ModelStep&, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    const Activations now = WithScratch(ctx, x);
    if (!saved_.gate_up.defined()) {
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w_in_, Write::kOverwrite, now.gate_up));
    }
    if (!saved_.h.defined()) ANNULUS_RETURN_IF_ERROR(SwigluForward(ctx, now.gate_up, now.h));

    const TensorRef dh = ctx.scratch.Allocate(x.dtype(), now.h.shape());
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy, w_down_, Write::kOverwrite, dh));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dy, now.h, dw_down_));
    const TensorRef dgate_up = ctx.scratch.Allocate(x.dtype(), now.gate_up.shape());
    ANNULUS_RETURN_IF_ERROR(SwigluBackward(ctx, now.gate_up, dh, dgate_up));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dgate_up, w_in_, Write::kOverwrite, dx));
    return LinearBackwardWeight(ctx, dgate_up, x, dw_in_);
  }

 private:
  struct Activations {
    TensorRef gate_up, h;  // [tokens, 2 d_ff], [tokens, d_ff]
  };

  TensorRef AllocateGateUp(Arena& arena, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {x.dim(0) * x.dim(1), 2 * d_ff_});
  }
  TensorRef AllocateH(Arena& arena, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {x.dim(0) * x.dim(1), d_ff_});
  }
  // What was kept, with scratch memory in place of what was not.
  Activations WithScratch(Context& ctx, ConstTensorRef x) const {
    Activations now = saved_;
    if (!now.gate_up.defined()) now.gate_up = AllocateGateUp(ctx.scratch, x);
    if (!now.h.defined()) now.h = AllocateH(ctx.scratch, x);
    return now;
  }

  Recompute recompute_;
  int64_t d_ff_;
  TensorRef w_in_, w_down_, dw_in_, dw_down_;
  Activations saved_;  // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeMlp(const ModelSpec& spec, size_t layer, Recompute recompute,
                                       const ParamStore& params) {
  return std::make_unique<MlpMixer>(spec, layer, recompute, params);
}

}  // namespace annulus
