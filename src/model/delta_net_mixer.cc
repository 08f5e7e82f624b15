// Gated DeltaNet (Yang et al., 2024):
//
//   q, k, v = silu(conv(x W^T))   q, k normalised to length 1   beta = sigmoid(x W_b^T)
//   a = -e^{A} softplus(x W_a^T + bias)        o = gated delta rule (annulus/ops/delta_rule.h)
//   y += (RMS(o) w * silu(x W_g^T)) W_o^T
//
// What a segment does to the state before it is a matrix, so that both go from rank to rank.

#include "annulus/model/mixer.h"
#include "annulus/ops/delta_rule.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/mamba_gates.h"
#include "annulus/ops/silu.h"
#include "short_conv.h"

namespace annulus {
namespace {

constexpr double kLengthEps = 1e-6;  // of the squared length of q and k

class DeltaNetMixer : public SequenceMixer {
 public:
  explicit DeltaNetMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        heads_(args.spec.delta.heads / args.shard.size),
        key_dim_(args.spec.delta.key_dim),
        value_dim_(args.spec.delta.value_dim),
        chunk_(args.spec.delta.chunk),
        eps_(args.spec.norm_eps) {
    const ParamTable& table = args.params.table();
    const auto index = [&](absl::string_view name) {
      return table.IndexOf(absl::StrCat(args.prefix(), name));
    };
    const auto both = [&](absl::string_view first, absl::string_view last, TensorRef* value,
                          TensorRef* grad) {
      *value = args.params.Values(index(first), index(last));
      *grad = args.params.Grads(index(first), index(last));
    };
    both("q.weight", "v.weight", &wqkv_, &dwqkv_);
    both("gate.weight", "gate.weight", &wgate_, &dwgate_);
    both("beta.weight", "decay.weight", &wsmall_, &dwsmall_);
    both("out.weight", "out.weight", &out_, &dout_);
    both("norm.weight", "norm.weight", &norm_, &dnorm_);
    both("a_log", "a_log", &a_log_, &da_log_);
    both("dt_bias", "dt_bias", &dt_bias_, &ddt_bias_);
    if (args.spec.delta.conv == 0) return;
    ConvPart conv;
    both("conv_q.weight", "conv_v.weight", &conv.w, &conv.dw);
    short_conv_.emplace({conv});
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override;
  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override;

 private:
  struct Activations {
    TensorRef qkv, gate, small;  // [rows, batch, q | k | v], [.., values], [.., beta | decay], as projected
    TensorRef halo;              // of qkv, where there are convolutions
    TensorRef convolved;         // silu(conv(qkv))
    TensorRef normalised;        // [rows, batch, q | k], of length 1
    TensorRef beta, a;           // [rows, batch, heads], accumulator dtype
    TensorRef o;                 // [rows, batch, values]
    TensorRef initial;           // state at the start of each segment
    TensorRef states;            // at the start of each chunk
  };

  int64_t keys() const { return heads_ * key_dim_; }
  int64_t values() const { return heads_ * value_dim_; }
  bool KeepsProducts() const {
    return recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
  }
  TensorRef Rows(Arena& arena, ModelStep& step, int64_t columns) const {
    return arena.Allocate(out_.dtype(), {step.rows(), step.batch(), columns});
  }
  void AllocateProducts(Arena& arena, ModelStep& step, Activations* to) const {
    to->qkv = Rows(arena, step, 2 * keys() + values());
    to->gate = Rows(arena, step, values());
    to->small = Rows(arena, step, 2 * heads_);
    to->o = Rows(arena, step, values());
  }
  void AllocatePrepared(Arena& arena, ModelStep& step, Activations* to) const {
    to->convolved = Rows(arena, step, 2 * keys() + values());
    to->normalised = Rows(arena, step, 2 * keys());
    to->beta = arena.Allocate(AccumOf(out_.dtype()), {step.rows(), step.batch(), heads_});
    to->a = arena.Allocate(AccumOf(out_.dtype()), {step.rows(), step.batch(), heads_});
  }
  TensorRef AllocateStates(Arena& arena, int64_t count, int64_t batch) const {
    return arena.Allocate(AccumOf(out_.dtype()), {count, batch * heads_, key_dim_, value_dim_});
  }
  SegmentSummary AllocateSummary(Arena& arena, const DeltaRule& rule) const {
    const int64_t segments = static_cast<int64_t>(rule.segments.size()), batch = rule.v.batch;
    return {
        .transition = arena.Allocate(AccumOf(out_.dtype()), {segments, batch * heads_, key_dim_ * key_dim_}),
        .state = AllocateStates(arena, segments, batch)};
  }

  DeltaRule RuleOf(Context& ctx, ModelStep& step, const Activations& now) const {
    return {.q = HeadsOf(now.normalised, 0, heads_, key_dim_),
            .k = HeadsOf(now.normalised, keys(), heads_, key_dim_),
            .v = HeadsOf(now.convolved, 2 * keys(), heads_, value_dim_),
            .beta = now.beta,
            .a = now.a,
            .ages = step.geometry.Ages(ctx),
            .segments = SegmentsOf(step.geometry),
            .chunk = chunk_};
  }
  GatedNorm NormOf(const Activations& now) const {
    return {
        .x = now.o, .gate = now.gate, .w = norm_, .groups = heads_, .eps = eps_, .kind = Gate::kSiluAfter};
  }
  MambaGates DecaysOf(const Activations& now) const {
    return {.raw = MatrixRef(now.small).Cols(heads_, 2 * heads_), .bias = dt_bias_, .a_log = a_log_};
  }

  absl::Status Project(Context& ctx, ModelStep& step, ConstTensorRef x, const Activations& to) const;
  absl::Status Prepare(Context& ctx, ModelStep& step, const Activations& now) const;
  absl::Status ComputeAgain(Context& ctx, ModelStep& step, ConstTensorRef x, Activations* now) const;
  absl::Status PrepareBackward(Context& ctx, ModelStep& step, const Activations& now,
                               const DeltaGradients& gradients, TensorRef dnormalised, TensorRef dconvolved,
                               TensorRef dsmall) const;

  Recompute recompute_;
  int64_t heads_, key_dim_, value_dim_, chunk_;
  double eps_;
  std::optional<ShortConv> short_conv_;
  TensorRef wqkv_, dwqkv_, wgate_, dwgate_, wsmall_, dwsmall_, out_, dout_, norm_, dnorm_;
  TensorRef a_log_, da_log_, dt_bias_, ddt_bias_;
  Activations saved_;  // of the forward in flight
};

// All but the gate, which is projected while states travel.
absl::Status DeltaNetMixer::Project(Context& ctx, ModelStep& step, ConstTensorRef x,
                                    const Activations& to) const {
  ArenaScope scope(ctx.scratch);
  HaloExchange exchange;
  if (short_conv_.has_value() && !saved_.halo.defined()) {
    const auto project = [&](ConstTensorRef rows, MatrixRef edges) {
      return LinearForward(ctx, rows, wqkv_, Write::kOverwrite, edges);
    };
    ANNULUS_ASSIGN_OR_RETURN(exchange, short_conv_->StartHalo(ctx, step, x, project, to.halo));
  }
  absl::Status status = LinearForward(ctx, x, wqkv_, Write::kOverwrite, to.qkv);
  if (status.ok()) status = LinearForward(ctx, x, wsmall_, Write::kOverwrite, to.small);
  status.Update(exchange.Finish(ctx));
  return status;
}

absl::Status DeltaNetMixer::Prepare(Context& ctx, ModelStep& step, const Activations& now) const {
  ANNULUS_RETURN_IF_ERROR(short_conv_.has_value()
                              ? short_conv_->Forward(ctx, step, now.qkv, now.halo, now.convolved)
                              : SiluForward(ctx, now.qkv, now.convolved));
  ANNULUS_RETURN_IF_ERROR(L2NormForward(ctx, HeadsOf(now.convolved, 0, 2 * heads_, key_dim_), kLengthEps,
                                        HeadsOf(now.normalised, 0, 2 * heads_, key_dim_)));
  const Shape shape{step.tokens(), heads_};
  ANNULUS_RETURN_IF_ERROR(
      SigmoidForward(ctx, MatrixRef(now.small).Cols(0, heads_), now.beta.Reshaped(shape)));
  ArenaScope scope(ctx.scratch);
  const TensorRef dt = ctx.scratch.Allocate(now.a.dtype(), shape);
  return MambaGatesForward(ctx, DecaysOf(now), dt, now.a.Reshaped(shape));
}

absl::Status DeltaNetMixer::Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) {
  const bool keeping = keep == Keep::kForBackward;
  saved_ = {};
  ArenaScope scope(ctx.scratch);
  Activations now;
  Arena& products = keeping && KeepsProducts() ? ctx.saved : ctx.scratch;
  Arena& prepared = keeping && recompute_ == Recompute::kNone ? ctx.saved : ctx.scratch;
  Arena& exchanged = keeping ? ctx.saved : ctx.scratch;
  AllocateProducts(products, step, &now);
  AllocatePrepared(prepared, step, &now);
  if (short_conv_.has_value()) now.halo = short_conv_->AllocateHalo(exchanged, step, x.dtype());
  const DeltaRule rule = RuleOf(ctx, step, now);
  now.initial = AllocateStates(exchanged, static_cast<int64_t>(rule.segments.size()), step.batch());
  now.states = AllocateStates(prepared, DeltaChunks(rule), step.batch());

  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
  ANNULUS_RETURN_IF_ERROR(Project(ctx, step, all, now));
  ANNULUS_RETURN_IF_ERROR(Prepare(ctx, step, now));
  if (step.geometry.cp().size() == 1) {
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, now.initial));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all, wgate_, Write::kOverwrite, now.gate));
  } else {
    const SegmentSummary summary = AllocateSummary(ctx.scratch, rule);
    ANNULUS_RETURN_IF_ERROR(DeltaSummary(ctx, rule, summary));
    ANNULUS_ASSIGN_OR_RETURN(StatePassing passing,
                             StatePassing::Start(ctx, step.geometry, StateOrder::kForward, summary));
    const absl::Status gate = LinearForward(ctx, all, wgate_, Write::kOverwrite, now.gate);
    ANNULUS_RETURN_IF_ERROR(passing.Finish(ctx, now.initial));
    step.AddStateBytes(passing.bytes_sent());
    ANNULUS_RETURN_IF_ERROR(gate);
  }
  ANNULUS_RETURN_IF_ERROR(
      DeltaForward(ctx, rule, now.initial, now.states, HeadsOf(now.o, 0, heads_, value_dim_)));
  const TensorRef gated = ctx.scratch.Allocate(x.dtype(), {step.tokens(), values()});
  ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, NormOf(now), gated));
  ANNULUS_RETURN_IF_ERROR(step.tensor.RowParallelForward(ctx, gated, out_, Write::kAccumulate, y));
  if (!keeping) return absl::OkStatus();
  saved_.halo = now.halo, saved_.initial = now.initial;
  if (KeepsProducts()) {
    saved_.qkv = now.qkv, saved_.gate = now.gate, saved_.small = now.small, saved_.o = now.o;
  }
  if (recompute_ == Recompute::kNone) {
    saved_.convolved = now.convolved, saved_.normalised = now.normalised;
    saved_.beta = now.beta, saved_.a = now.a, saved_.states = now.states;
  }
  return absl::OkStatus();
}

// What forward did not keep. Nothing is exchanged again: halos and states at the start of segments are kept.
absl::Status DeltaNetMixer::ComputeAgain(Context& ctx, ModelStep& step, ConstTensorRef x,
                                         Activations* now) const {
  *now = saved_;
  if (!now->qkv.defined()) {
    AllocateProducts(ctx.scratch, step, now);
    ANNULUS_RETURN_IF_ERROR(Project(ctx, step, x, *now));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wgate_, Write::kOverwrite, now->gate));
  }
  if (now->convolved.defined()) return absl::OkStatus();
  AllocatePrepared(ctx.scratch, step, now);
  ANNULUS_RETURN_IF_ERROR(Prepare(ctx, step, *now));
  const DeltaRule rule = RuleOf(ctx, step, *now);
  now->states = AllocateStates(ctx.scratch, DeltaChunks(rule), step.batch());
  return DeltaForward(ctx, rule, now->initial, now->states, HeadsOf(now->o, 0, heads_, value_dim_));
}

// From the gradients of q, k, v, beta and a to those behind the convolution, and of the small projections.
absl::Status DeltaNetMixer::PrepareBackward(Context& ctx, ModelStep& step, const Activations& now,
                                            const DeltaGradients& gradients, TensorRef dnormalised,
                                            TensorRef dconvolved, TensorRef dsmall) const {
  ANNULUS_RETURN_IF_ERROR(L2NormBackward(ctx, HeadsOf(now.convolved, 0, 2 * heads_, key_dim_), kLengthEps,
                                         HeadsOf(dnormalised, 0, 2 * heads_, key_dim_),
                                         HeadsOf(dconvolved, 0, 2 * heads_, key_dim_)));
  const Shape shape{step.tokens(), heads_};
  ANNULUS_RETURN_IF_ERROR(SigmoidBackward(ctx, now.beta.Reshaped(shape), gradients.dbeta.Reshaped(shape),
                                          MatrixRef(dsmall).Cols(0, heads_)));
  return MambaGatesBackward(ctx, DecaysOf(now), {}, gradients.da.Reshaped(shape),
                            MatrixRef(dsmall).Cols(heads_, 2 * heads_), ddt_bias_, da_log_);
}

absl::Status DeltaNetMixer::Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                                     TensorRef dx) {
  ArenaScope scope(ctx.scratch);
  const DType dtype = x.dtype();
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef dy_all, step.tensor.Gather(ctx, dy));
  Activations now;
  ANNULUS_RETURN_IF_ERROR(ComputeAgain(ctx, step, all, &now));

  const TensorRef gated = ctx.scratch.Allocate(dtype, {step.tokens(), values()});
  const TensorRef dgated = ctx.scratch.Allocate(dtype, {step.tokens(), values()});
  const TensorRef dgate = ctx.scratch.Allocate(dtype, now.gate.shape());
  const TensorRef d_o = ctx.scratch.Allocate(dtype, now.o.shape());
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy_all, out_, Write::kOverwrite, dgated));
  ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, NormOf(now), gated));
  ANNULUS_RETURN_IF_ERROR(GatedNormBackward(ctx, NormOf(now), dgated, d_o, dgate, dnorm_));

  const DeltaRule rule = RuleOf(ctx, step, now);
  const HeadsRef dout_heads = HeadsOf(d_o, 0, heads_, value_dim_);
  const SegmentSummary summary = AllocateSummary(ctx.scratch, rule);
  const TensorRef final_gradient = ctx.scratch.Allocate(summary.state.dtype(), summary.state.shape());
  if (step.geometry.cp().size() == 1) {
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, final_gradient));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dy_all, gated, dout_));
  } else {
    ANNULUS_RETURN_IF_ERROR(DeltaBackwardSummary(ctx, rule, dout_heads, summary));
    ANNULUS_ASSIGN_OR_RETURN(StatePassing passing,
                             StatePassing::Start(ctx, step.geometry, StateOrder::kBackward, summary));
    const absl::Status weight = LinearBackwardWeight(ctx, dy_all, gated, dout_);
    ANNULUS_RETURN_IF_ERROR(passing.Finish(ctx, final_gradient));
    step.AddStateBytes(passing.bytes_sent());
    ANNULUS_RETURN_IF_ERROR(weight);
  }
  const TensorRef dnormalised = ctx.scratch.Allocate(dtype, now.normalised.shape());
  const TensorRef dconvolved = ctx.scratch.Allocate(dtype, now.convolved.shape());
  const TensorRef dqkv = ctx.scratch.Allocate(dtype, now.qkv.shape());
  const TensorRef dsmall = ctx.scratch.Allocate(dtype, now.small.shape());
  const DeltaGradients gradients{.dq = HeadsOf(dnormalised, 0, heads_, key_dim_),
                                 .dk = HeadsOf(dnormalised, keys(), heads_, key_dim_),
                                 .dv = HeadsOf(dconvolved, 2 * keys(), heads_, value_dim_),
                                 .dbeta = ctx.scratch.Allocate(now.beta.dtype(), now.beta.shape()),
                                 .da = ctx.scratch.Allocate(now.a.dtype(), now.a.shape())};
  ANNULUS_RETURN_IF_ERROR(DeltaBackward(ctx, rule, dout_heads, now.states, final_gradient, gradients));
  ANNULUS_RETURN_IF_ERROR(PrepareBackward(ctx, step, now, gradients, dnormalised, dconvolved, dsmall));
  const auto gate_weights = [&] { return LinearBackwardWeight(ctx, dgate, all, dwgate_); };
  if (short_conv_.has_value()) {
    ANNULUS_RETURN_IF_ERROR(
        short_conv_->Backward(ctx, step, now.qkv, now.halo, dconvolved, gate_weights, dqkv));
  } else {
    ANNULUS_RETURN_IF_ERROR(SiluBackward(ctx, now.qkv, dconvolved, dqkv));
    ANNULUS_RETURN_IF_ERROR(gate_weights());
  }

  const TensorRef partial = step.tensor.Partial(ctx, dx);
  ANNULUS_RETURN_IF_ERROR(
      LinearBackwardInput(ctx, dqkv, wqkv_, step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dgate, wgate_, Write::kAccumulate, partial));
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dsmall, wsmall_, Write::kAccumulate, partial));
  ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
  absl::Status status = LinearBackwardWeight(ctx, dqkv, all, dwqkv_);
  if (status.ok()) status = LinearBackwardWeight(ctx, dsmall, all, dwsmall_);
  ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
  return status;
}

}  // namespace

std::unique_ptr<SequenceMixer> MakeDeltaNet(const MixerArgs& args) {
  return std::make_unique<DeltaNetMixer>(args);
}

}  // namespace annulus
