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
    if (keep == Keep::kForBackward && recompute_ == Recompute::kNone) saved_ = Allocate(ctx.saved, x);
    ArenaScope scope(ctx.scratch);
    const Activations now = saved_.h.defined() ? saved_ : Allocate(ctx.scratch, x);
    ANNULUS_RETURN_IF_ERROR(Compute(ctx, x, now));
    return LinearForward(ctx, now.h, w_down_, Write::kAccumulate, y);
  }

  absl::Status Backward(Context& ctx, ModelStep&, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    const Activations now = saved_.h.defined() ? saved_ : Allocate(ctx.scratch, x);
    if (!saved_.h.defined()) ANNULUS_RETURN_IF_ERROR(Compute(ctx, x, now));

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

  Activations Allocate(Arena& arena, ConstTensorRef x) const {
    const int64_t tokens = x.dim(0) * x.dim(1);
    return {arena.Allocate(x.dtype(), {tokens, 2 * d_ff_}), arena.Allocate(x.dtype(), {tokens, d_ff_})};
  }
  absl::Status Compute(Context& ctx, ConstTensorRef x, const Activations& to) const {
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w_in_, Write::kOverwrite, to.gate_up));
    return SwigluForward(ctx, to.gate_up, to.h);
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
