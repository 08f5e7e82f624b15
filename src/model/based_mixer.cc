// The linear attention of BASED (Arora et al., 2024): softmax with its exponential replaced by its Taylor
// series of second order, whose features are finite.
//
//   q = x W_q^T   [k | v] = x W_kv^T
//   o_t = phi(q_t) sum_{s <= t} phi(k_s) v_s^T / (phi(q_t) sum_{s <= t} phi(k_s) + eps)   y += o W_o^T
//
// The scan is that of annulus/ops/ssd.h without decay, b = phi(k), c = phi(q), x = [v | 1]: its last column
// is the normaliser. States know nothing of queries, which are projected while those travel.

#include "annulus/model/mixer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/taylor_features.h"
#include "state_scan.h"

namespace annulus {
namespace {

constexpr double kNormaliserEps = 1e-12;

class BasedMixer : public SequenceMixer {
 public:
  explicit BasedMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        heads_(args.spec.based.heads / args.shard.size),
        key_dim_(args.spec.based.key_dim),
        value_dim_(args.spec.based.value_dim),
        chunk_(args.spec.based.chunk) {
    const ParamTable& table = args.params.table();
    const auto index = [&](absl::string_view name) {
      return table.IndexOf(absl::StrCat(args.prefix(), name));
    };
    wq_ = args.params.Value(index("q.weight")), dwq_ = args.params.Grad(index("q.weight"));
    wkv_ = args.params.Values(index("k.weight"), index("v.weight"));
    dwkv_ = args.params.Grads(index("k.weight"), index("v.weight"));
    out_ = args.params.Value(index("out.weight")), dout_ = args.params.Grad(index("out.weight"));
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    const bool keeping = keep == Keep::kForBackward;
    saved_ = {};
    ArenaScope scope(ctx.scratch);
    Activations now;
    Arena& products = keeping && KeepsProducts() ? ctx.saved : ctx.scratch;
    Arena& features = keeping && recompute_ == Recompute::kNone ? ctx.saved : ctx.scratch;
    AllocateProducts(products, step, &now);
    AllocateFeatures(features, step, &now);
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all, wkv_, Write::kOverwrite, now.kv));
    ANNULUS_RETURN_IF_ERROR(PrepareKv(ctx, now));
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, now));
    now.initial = AllocateSegmentStates(keeping ? ctx.saved : ctx.scratch, scan);
    now.states = AllocateStates(features, scan);
    const auto project_q = [&]() -> absl::Status {
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all, wq_, Write::kOverwrite, now.q));
      return PrepareQ(ctx, now);
    };
    ANNULUS_RETURN_IF_ERROR(
        ScanForward(ctx, step, scan, now.initial, now.states, project_q, Heads(now.sums, value_dim_ + 1)));
    const TensorRef o = AllocateValues(ctx.scratch, step);
    ANNULUS_RETURN_IF_ERROR(
        NormaliseForward(ctx, Heads(now.sums, value_dim_ + 1), kNormaliserEps, Heads(o, value_dim_)));
    ANNULUS_RETURN_IF_ERROR(step.tensor.RowParallelForward(ctx, o, out_, Write::kAccumulate, y));
    if (!keeping) return absl::OkStatus();
    saved_.initial = now.initial;
    if (KeepsProducts()) saved_.q = now.q, saved_.kv = now.kv, saved_.sums = now.sums;
    if (recompute_ == Recompute::kNone) {
      saved_.features = now.features, saved_.ones = now.ones, saved_.states = now.states;
    }
    return absl::OkStatus();
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    const DType dtype = x.dtype();
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef dy_all, step.tensor.Gather(ctx, dy));
    Activations now;
    ANNULUS_RETURN_IF_ERROR(ComputeAgain(ctx, step, all, &now));

    const HeadsRef sums = Heads(now.sums, value_dim_ + 1);
    const TensorRef o = AllocateValues(ctx.scratch, step);
    const TensorRef d_o = AllocateValues(ctx.scratch, step);
    const TensorRef dsums = ctx.scratch.Allocate(dtype, now.sums.shape());
    ANNULUS_RETURN_IF_ERROR(NormaliseForward(ctx, sums, kNormaliserEps, Heads(o, value_dim_)));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy_all, out_, Write::kOverwrite, d_o));
    ANNULUS_RETURN_IF_ERROR(
        NormaliseBackward(ctx, sums, kNormaliserEps, Heads(d_o, value_dim_), Heads(dsums, value_dim_ + 1)));

    const TensorRef dfeatures = ctx.scratch.Allocate(dtype, now.features.shape());
    const TensorRef dones = ctx.scratch.Allocate(dtype, now.ones.shape());
    const TensorRef da = ctx.scratch.Allocate(AccumOf(dtype), {step.rows(), step.batch(), heads_});
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, now));
    ANNULUS_RETURN_IF_ERROR(ScanBackward(ctx, step, scan, Heads(dsums, value_dim_ + 1), now.states,
                                         [&] { return LinearBackwardWeight(ctx, dy_all, o, dout_); },
                                         {.dx = Heads(dones, value_dim_ + 1),
                                          .db = Features(dfeatures, heads_),
                                          .dc = Features(dfeatures, 0),
                                          .ddt = {},
                                          .da = da,
                                          .dskip = {}}));

    const TensorRef dq = ctx.scratch.Allocate(dtype, now.q.shape());
    const TensorRef dkv = ctx.scratch.Allocate(dtype, now.kv.shape());
    ANNULUS_RETURN_IF_ERROR(TaylorFeaturesBackward(ctx, Keys(now.q), Features(dfeatures, 0), Keys(dq)));
    ANNULUS_RETURN_IF_ERROR(
        TaylorFeaturesBackward(ctx, Keys(now.kv), Features(dfeatures, heads_), Keys(dkv)));
    ANNULUS_RETURN_IF_ERROR(DropLastColumn(ctx, Heads(dones, value_dim_ + 1), ValuesOf(dkv)));

    const TensorRef partial = step.tensor.Partial(ctx, dx);
    ANNULUS_RETURN_IF_ERROR(
        LinearBackwardInput(ctx, dkv, wkv_, step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dq, wq_, Write::kAccumulate, partial));
    ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
    absl::Status status = LinearBackwardWeight(ctx, dkv, all, dwkv_);
    if (status.ok()) status = LinearBackwardWeight(ctx, dq, all, dwq_);
    ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
    return status;
  }

 private:
  struct Activations {
    TensorRef q, kv;           // [rows, batch, keys], [rows, batch, k | v]
    TensorRef features, ones;  // [rows, batch, phi(q) | phi(k)], [rows, batch, heads * (value_dim + 1)]
    TensorRef sums;            // what the scan gives: as `ones`
    SegmentStates initial;
    SsdStates states;
  };

  int64_t features() const { return TaylorFeatures(key_dim_); }
  HeadsRef Heads(TensorRef t, int64_t dim) const { return HeadsOf(t, 0, heads_, dim); }
  HeadsRef Keys(TensorRef q_or_kv) const { return HeadsOf(q_or_kv, 0, heads_, key_dim_); }
  HeadsRef ValuesOf(TensorRef kv) const { return HeadsOf(kv, heads_ * key_dim_, heads_, value_dim_); }
  // Behind those of `first` heads.
  HeadsRef Features(TensorRef t, int64_t first) const {
    return HeadsOf(t, first * features(), heads_, features());
  }
  bool KeepsProducts() const {
    return recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
  }
  void AllocateProducts(Arena& arena, ModelStep& step, Activations* to) const {
    const DType dtype = out_.dtype();
    to->q = arena.Allocate(dtype, {step.rows(), step.batch(), heads_ * key_dim_});
    to->kv = arena.Allocate(dtype, {step.rows(), step.batch(), heads_ * (key_dim_ + value_dim_)});
    to->sums = arena.Allocate(dtype, {step.rows(), step.batch(), heads_ * (value_dim_ + 1)});
  }
  void AllocateFeatures(Arena& arena, ModelStep& step, Activations* to) const {
    const DType dtype = out_.dtype();
    to->features = arena.Allocate(dtype, {step.rows(), step.batch(), 2 * heads_ * features()});
    to->ones = arena.Allocate(dtype, {step.rows(), step.batch(), heads_ * (value_dim_ + 1)});
  }

  TensorRef AllocateValues(Arena& arena, ModelStep& step) const {
    return arena.Allocate(out_.dtype(), {step.rows(), step.batch(), heads_ * value_dim_});
  }

  absl::Status PrepareKv(Context& ctx, const Activations& now) const {
    ANNULUS_RETURN_IF_ERROR(TaylorFeaturesForward(ctx, Keys(now.kv), Features(now.features, heads_)));
    return AppendOnes(ctx, ValuesOf(now.kv), Heads(now.ones, value_dim_ + 1));
  }
  absl::Status PrepareQ(Context& ctx, const Activations& now) const {
    return TaylorFeaturesForward(ctx, Keys(now.q), Features(now.features, 0));
  }

  // Nothing decays: the logarithms are zeros in ctx.scratch.
  absl::StatusOr<Ssd> ScanOf(Context& ctx, ModelStep& step, const Activations& now) const {
    const TensorRef a = ctx.scratch.Allocate(AccumOf(out_.dtype()), {step.rows(), step.batch(), heads_});
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, a));
    return Ssd{.x = Heads(now.ones, value_dim_ + 1),
               .b = Features(now.features, heads_),
               .c = Features(now.features, 0),
               .dt = {},
               .a = a,
               .skip = {},
               .ages = step.geometry.Ages(ctx),
               .segments = SegmentsOf(step.geometry),
               .chunk = chunk_};
  }

  // What forward did not keep. States are not exchanged again: those at the start of segments are kept.
  absl::Status ComputeAgain(Context& ctx, ModelStep& step, ConstTensorRef x, Activations* now) const {
    *now = saved_;
    if (!now->q.defined()) {
      AllocateProducts(ctx.scratch, step, now);
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wkv_, Write::kOverwrite, now->kv));
      ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, wq_, Write::kOverwrite, now->q));
    }
    if (now->features.defined()) return absl::OkStatus();
    AllocateFeatures(ctx.scratch, step, now);
    ANNULUS_RETURN_IF_ERROR(PrepareKv(ctx, *now));
    ANNULUS_RETURN_IF_ERROR(PrepareQ(ctx, *now));
    ANNULUS_ASSIGN_OR_RETURN(const Ssd scan, ScanOf(ctx, step, *now));
    now->states = AllocateStates(ctx.scratch, scan);
    return ScanAgain(ctx, scan, now->initial, now->states, Heads(now->sums, value_dim_ + 1));
  }

  Recompute recompute_;
  int64_t heads_, key_dim_, value_dim_, chunk_;
  TensorRef wq_, dwq_, wkv_, dwkv_, out_, dout_;
  Activations saved_;  // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeBased(const MixerArgs& args) { return std::make_unique<BasedMixer>(args); }

}  // namespace annulus
