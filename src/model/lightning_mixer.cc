// Lightning attention (Qin et al., 2024): linear attention with a fixed decay for each head.
//
//   [q | k | v] = silu(x W^T)     S_t = e^{-s_h} S_{t-1} + k_t v_t^T     o_t = S_t^T q_t
//   y += (sigmoid(x W_g^T) * RMS(o) w) W_o^T
//
// The decays fall with depth: s_h = 2^{-8 h / H} (1 - l / (L - 1 + 1e-5) + 1e-5) for head h = 1 .. H in the
// l-th of L layers that mix tokens. The scan is that of annulus/ops/ssd.h with b = k, c = q, x = v.

#include <algorithm>
#include <cmath>

#include "annulus/device/transfer.h"
#include "annulus/model/mixer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/silu.h"
#include "state_scan.h"

namespace annulus {
namespace {

bool LayerMixesTokens(const LayerSpec& layer) {
  return std::any_of(layer.branches.begin(), layer.branches.end(),
                     [](const BranchSpec& branch) { return MixesTokens(branch.kind); });
}

// -s_h of this rank's heads.
std::vector<double> LogDecays(const ModelSpec& spec, size_t layer, TensorShard shard) {
  const auto mixing = [&](size_t end) {
    return static_cast<double>(std::count_if(
        spec.layers.begin(), spec.layers.begin() + static_cast<std::ptrdiff_t>(end), LayerMixesTokens));
  };
  const double depth = 1 - mixing(layer) / (mixing(spec.layers.size()) - 1 + 1e-5) + 1e-5;
  const int64_t heads = spec.lightning.heads, here = heads / shard.size;
  std::vector<double> decays;
  for (int64_t h = shard.rank * here + 1; h <= (shard.rank + 1) * here; ++h) {
    decays.push_back(-std::exp2(-8 * static_cast<double>(h) / static_cast<double>(heads)) * depth);
  }
  return decays;
}

class LightningMixer : public SequenceMixer {
 public:
  explicit LightningMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        heads_(args.spec.lightning.heads / args.shard.size),
        key_dim_(args.spec.lightning.key_dim),
        value_dim_(args.spec.lightning.value_dim),
        chunk_(args.spec.lightning.chunk),
        eps_(args.spec.norm_eps),
        log_decays_(LogDecays(args.spec, args.layer, args.shard)) {
    const ParamTable& table = args.params.table();
    const auto index = [&](absl::string_view name) {
      return table.IndexOf(absl::StrCat(args.prefix(), name));
    };
    wqkv_ = args.params.Values(index("q.weight"), index("v.weight"));
    dwqkv_ = args.params.Grads(index("q.weight"), index("v.weight"));
    wgate_ = args.params.Value(index("gate.weight")), dwgate_ = args.params.Grad(index("gate.weight"));
    norm_ = args.params.Value(index("norm.weight")), dnorm_ = args.params.Grad(index("norm.weight"));
    out_ = args.params.Value(index("out.weight")), dout_ = args.params.Grad(index("out.weight"));
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    const bool keeping = keep == Keep::kForBackward;
    saved_ = {};
    ArenaScope scope(ctx.scratch);
    Activations now;
    Arena& products = keeping && KeepsProducts() ? ctx.saved : ctx.scratch;
    AllocateProducts(products, step, &now);
    AllocateScan(keeping && recompute_ == Recompute::kNone ? ctx.saved : ctx.scratch, step, &now);
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all, wqkv_, Write::kOverwrite, now.qkv));
    ANNULUS_RETURN_IF_ERROR(SiluForward(ctx, now.qkv, now.activated));
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, now));
    now.initial = AllocateSegmentStates(keeping ? ctx.saved : ctx.scratch, scan);
    now.states = AllocateStates(keeping && recompute_ == Recompute::kNone ? ctx.saved : ctx.scratch, scan);
    const auto project_gate = [&] { return LinearForward(ctx, all, wgate_, Write::kOverwrite, now.gate); };
    ANNULUS_RETURN_IF_ERROR(ScanForward(ctx, step, scan, now.initial, now.states, project_gate,
                                        HeadsOf(now.o, 0, heads_, value_dim_)));
    const TensorRef gated = ctx.scratch.Allocate(x.dtype(), {step.tokens(), values()});
    ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, NormOf(now), gated));
    ANNULUS_RETURN_IF_ERROR(step.tensor.RowParallelForward(ctx, gated, out_, Write::kAccumulate, y));
    if (!keeping) return absl::OkStatus();
    saved_.initial = now.initial;
    if (KeepsProducts()) saved_.qkv = now.qkv, saved_.gate = now.gate, saved_.o = now.o;
    if (recompute_ == Recompute::kNone) saved_.activated = now.activated, saved_.states = now.states;
    return absl::OkStatus();
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef dy_all, step.tensor.Gather(ctx, dy));
    Activations now;
    ANNULUS_RETURN_IF_ERROR(ComputeAgain(ctx, step, all, &now));

    const DType dtype = x.dtype();
    const TensorRef gated = ctx.scratch.Allocate(dtype, {step.tokens(), values()});
    const TensorRef dgated = ctx.scratch.Allocate(dtype, {step.tokens(), values()});
    const TensorRef dgate = ctx.scratch.Allocate(dtype, now.gate.shape());
    const TensorRef d_o = ctx.scratch.Allocate(dtype, now.o.shape());
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy_all, out_, Write::kOverwrite, dgated));
    ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, NormOf(now), gated));
    ANNULUS_RETURN_IF_ERROR(GatedNormBackward(ctx, NormOf(now), dgated, d_o, dgate, dnorm_));

    const TensorRef dqkv = ctx.scratch.Allocate(dtype, now.qkv.shape());
    const TensorRef da =
        ctx.scratch.Allocate(AccumOf(dtype), {step.rows(), step.batch(), heads_});  // decays are fixed
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, now));
    ANNULUS_RETURN_IF_ERROR(ScanBackward(ctx, step, scan, HeadsOf(d_o, 0, heads_, value_dim_), now.states,
                                         [&] { return LinearBackwardWeight(ctx, dy_all, gated, dout_); },
                                         {.dx = HeadsOf(dqkv, 2 * keys(), heads_, value_dim_),
                                          .db = HeadsOf(dqkv, keys(), heads_, key_dim_),
                                          .dc = HeadsOf(dqkv, 0, heads_, key_dim_),
                                          .ddt = {},
                                          .da = da,
                                          .dskip = {}}));
    ANNULUS_RETURN_IF_ERROR(SiluBackward(ctx, now.qkv, dqkv, dqkv));

    const TensorRef partial = step.tensor.Partial(ctx, dx);
    ANNULUS_RETURN_IF_ERROR(
        LinearBackwardInput(ctx, dqkv, wqkv_, step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dgate, wgate_, Write::kAccumulate, partial));
    ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
    absl::Status status = LinearBackwardWeight(ctx, dqkv, all, dwqkv_);
    if (status.ok()) status = LinearBackwardWeight(ctx, dgate, all, dwgate_);
    ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
    return status;
  }

 private:
  struct Activations {
    TensorRef qkv, gate;  // [rows, batch, q | k | v], [rows, batch, values], as projected
    TensorRef activated;  // silu(qkv)
    TensorRef o;          // [rows, batch, values]
    SegmentStates initial;
    SsdStates states;
  };

  int64_t keys() const { return heads_ * key_dim_; }
  int64_t values() const { return heads_ * value_dim_; }
  bool KeepsProducts() const {
    return recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
  }
  void AllocateProducts(Arena& arena, ModelStep& step, Activations* to) const {
    to->qkv = arena.Allocate(out_.dtype(), {step.rows(), step.batch(), 2 * keys() + values()});
    to->gate = arena.Allocate(out_.dtype(), {step.rows(), step.batch(), values()});
    to->o = arena.Allocate(out_.dtype(), {step.rows(), step.batch(), values()});
  }
  void AllocateScan(Arena& arena, ModelStep& step, Activations* to) const {
    to->activated = arena.Allocate(out_.dtype(), {step.rows(), step.batch(), 2 * keys() + values()});
  }

  // The decays are written anew for each pass, in ctx.scratch.
  absl::StatusOr<Ssd> ScanOf(Context& ctx, ModelStep& step, const Activations& now) const {
    const DType accum = AccumOf(out_.dtype());
    const TensorRef a = ctx.scratch.Allocate(accum, {step.rows(), step.batch(), heads_});
    const TensorRef row = VisitFloat(accum, [&]<class T>() {
      const std::vector<T> values(log_decays_.begin(), log_decays_.end());
      return Upload<T>(ctx, ctx.scratch, values);
    });
    ANNULUS_RETURN_IF_ERROR(RepeatRow(ctx, row, a));
    return Ssd{.x = HeadsOf(now.activated, 2 * keys(), heads_, value_dim_),
               .b = HeadsOf(now.activated, keys(), heads_, key_dim_),
               .c = HeadsOf(now.activated, 0, heads_, key_dim_),
               .dt = {},
               .a = a,
               .skip = {},
               .ages = step.geometry.Ages(ctx),
               .segments = SegmentsOf(step.geometry),
               .chunk = chunk_};
  }

  GatedNorm NormOf(const Activations& now) const {
    return {
        .x = now.o, .gate = now.gate, .w = norm_, .groups = heads_, .eps = eps_, .kind = Gate::kSigmoidAfter};
  }

  // What forward did not keep. States are not exchanged again: those at the start of segments are kept.
  absl::Status ComputeAgain(Context& ctx, ModelStep& step, ConstTensorRef x, Activations* now) const {
    *now = saved_;
    if (!now->qkv.defined()) {
      AllocateProducts(ctx.scratch, step, now);
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wqkv_, Write::kOverwrite, now->qkv));
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wgate_, Write::kOverwrite, now->gate));
    }
    if (now->activated.defined()) return absl::OkStatus();
    AllocateScan(ctx.scratch, step, now);
    ANNULUS_RETURN_IF_ERROR(SiluForward(ctx, now->qkv, now->activated));
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, *now));
    now->states = AllocateStates(ctx.scratch, scan);
    return ScanAgain(ctx, scan, now->initial, now->states, HeadsOf(now->o, 0, heads_, value_dim_));
  }

  Recompute recompute_;
  int64_t heads_, key_dim_, value_dim_, chunk_;
  double eps_;
  std::vector<double> log_decays_;
  TensorRef wqkv_, dwqkv_, wgate_, dwgate_, norm_, dnorm_, out_, dout_;
  Activations saved_;  // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeLightning(const MixerArgs& args) {
  return std::make_unique<LightningMixer>(args);
}

}  // namespace annulus
