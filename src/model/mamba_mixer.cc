// Mamba-2 (Dao and Gu, 2024), with its heads split over a tensor-parallel group and its sequence over a
// context-parallel one:
//
//   [b | c | x | z | dt] = x_in W_in^T      b, c, x = silu(conv(b, c, x))      dt, a = gates(dt)
//   y = scan(x, b, c, dt, a) + D x          y_out += (RMS_group(y * silu(z)) w) W_out^T
//
// Between ranks of a sequence go the last conv - 1 rows of [b | c | x] before the convolution, and states.
// Projected first, the former travel under the projection of everything else; states travel under that of z.
// In backward gradients of states travel under the product for those of the output's weights, gradients of
// the rows under that for z's.

#include <cmath>

#include "annulus/model/mixer.h"
#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/mamba_gates.h"
#include "short_conv.h"
#include "state_scan.h"

namespace annulus {
namespace {

class MambaMixer : public SequenceMixer {
 public:
  explicit MambaMixer(const MixerArgs& args);

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override;
  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override;

 private:
  struct Activations {
    TensorRef proj;   // [rows, batch, b | c | x | z | dt], before the convolution
    TensorRef halo;   // [segments, conv - 1, batch, b | c | x]: of it, before each segment
    TensorRef xbc;    // [rows, batch, b | c | x], behind it
    TensorRef dt, a;  // [rows, batch, heads], accumulator dtype
    TensorRef y;      // [rows, batch, inner]
    SegmentStates initial;
    SsdStates states;
  };
  // Rows of a weight that this rank uses: all that it holds but where B and C of all groups are on every
  // rank.
  struct Weights {
    TensorRef bcx, z, dt, zdt;  // bcx undefined where its parts are not adjacent
    TensorRef b, c, x;
  };

  int64_t inner() const { return heads_ * head_dim_; }
  int64_t bc_columns() const { return groups_ * state_; }
  int64_t conv_columns() const { return 2 * bc_columns() + inner(); }
  int64_t columns() const { return conv_columns() + inner() + heads_; }

  bool KeepsProducts() const {
    return recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise;
  }
  void AllocateProducts(Arena& arena, ModelStep& step, Activations* to) const;
  void AllocateConvolved(Arena& arena, ModelStep& step, Activations* to) const;
  Ssd ScanOf(Context& ctx, ModelStep& step, const Activations& now) const;
  GatedNorm NormOf(Context& ctx, ModelStep& step, const Activations& now) const;
  MatrixRef Columns(TensorRef proj, int64_t begin, int64_t count) const;

  absl::Status ProjectBcx(Context& ctx, ConstTensorRef x, MatrixRef to) const;
  absl::Status Project(Context& ctx, ModelStep& step, ConstTensorRef x, const Activations& to) const;
  absl::Status Convolve(Context& ctx, ModelStep& step, const Activations& now) const;
  absl::Status Recomputed(Context& ctx, ModelStep& step, ConstTensorRef x, Activations* now) const;
  absl::Status ProjectBackward(Context& ctx, ModelStep& step, ConstTensorRef x, TensorRef dproj,
                               TensorRef dx) const;

  Recompute recompute_;
  int64_t heads_, head_dim_, state_, groups_, chunk_;  // heads and groups: here
  int64_t all_groups_, shared_ranks_;  // groups of the model; ranks among which one group's heads are spread
  double dt_min_, dt_max_, eps_;
  Weights w_, dw_;
  ShortConv short_conv_;
  TensorRef norm_, dnorm_, out_, dout_;
  TensorRef a_log_, da_log_, skip_, dskip_, dt_bias_, ddt_bias_;
  Activations saved_;  // of the forward in flight
};

MambaMixer::MambaMixer(const MixerArgs& args)
    : recompute_(args.recompute),
      head_dim_(args.spec.mamba.head_dim),
      state_(args.spec.mamba.state),
      chunk_(args.spec.mamba.chunk),
      all_groups_(args.spec.mamba.groups),
      dt_min_(args.spec.mamba.dt_min),
      dt_max_(args.spec.mamba.dt_max),
      eps_(args.spec.norm_eps) {
  const MambaSpec& spec = args.spec.mamba;
  const int64_t tp = args.shard.size;
  heads_ = spec.heads / tp;
  groups_ = std::max<int64_t>(1, spec.groups / tp);
  shared_ranks_ = std::max<int64_t>(1, tp / spec.groups);
  const ParamTable& table = args.params.table();
  const auto index = [&](absl::string_view name) { return table.IndexOf(absl::StrCat(args.prefix(), name)); };
  const auto value = [&](absl::string_view name) { return args.params.Value(index(name)); };
  const auto grad = [&](absl::string_view name) { return args.params.Grad(index(name)); };

  // Where the groups are fewer than the ranks every rank holds B and C of all, and uses those of its heads.
  const int64_t first = shared_ranks_ > 1 ? args.shard.rank / shared_ranks_ * state_ : 0;
  const auto own_group = [&](TensorRef t) { return t.Rows(first, first + bc_columns()); };
  w_.b = own_group(value("b.weight")), dw_.b = own_group(grad("b.weight"));
  w_.c = own_group(value("c.weight")), dw_.c = own_group(grad("c.weight"));
  w_.x = value("x.weight"), dw_.x = grad("x.weight");
  w_.z = value("z.weight"), dw_.z = grad("z.weight");
  w_.dt = value("dt.weight"), dw_.dt = grad("dt.weight");
  w_.zdt = args.params.Values(index("z.weight"), index("dt.weight"));
  dw_.zdt = args.params.Grads(index("z.weight"), index("dt.weight"));
  if (w_.b.dim(0) == value("b.weight").dim(0)) {
    w_.bcx = args.params.Values(index("b.weight"), index("x.weight"));
    dw_.bcx = args.params.Grads(index("b.weight"), index("x.weight"));
  }
  const auto part = [&](absl::string_view name, bool of_groups) {
    const auto own = [&](TensorRef t) { return of_groups ? own_group(t) : t; };
    const std::string weight = absl::StrCat("conv_", name, ".weight"),
                      bias = absl::StrCat("conv_", name, ".bias");
    return ConvPart{
        .w = own(value(weight)), .dw = own(grad(weight)), .bias = own(value(bias)), .dbias = own(grad(bias))};
  };
  short_conv_ = ShortConv({part("b", true), part("c", true), part("x", false)});
  norm_ = value("norm.weight"), dnorm_ = grad("norm.weight");
  out_ = value("out.weight"), dout_ = grad("out.weight");
  a_log_ = value("a_log"), da_log_ = grad("a_log");
  skip_ = value("d"), dskip_ = grad("d");
  dt_bias_ = value("dt_bias"), ddt_bias_ = grad("dt_bias");
}

void MambaMixer::AllocateProducts(Arena& arena, ModelStep& step, Activations* to) const {
  const DType dtype = out_.dtype();
  to->proj = arena.Allocate(dtype, {step.rows(), step.batch(), columns()});
  to->y = arena.Allocate(dtype, {step.rows(), step.batch(), inner()});
}

void MambaMixer::AllocateConvolved(Arena& arena, ModelStep& step, Activations* to) const {
  const DType dtype = out_.dtype();
  to->xbc = arena.Allocate(dtype, {step.rows(), step.batch(), conv_columns()});
  to->dt = arena.Allocate(AccumOf(dtype), {step.rows(), step.batch(), heads_});
  to->a = arena.Allocate(AccumOf(dtype), {step.rows(), step.batch(), heads_});
}

Ssd MambaMixer::ScanOf(Context& ctx, ModelStep& step, const Activations& now) const {
  return {.x = HeadsOf(now.xbc, 2 * bc_columns(), heads_, head_dim_),
          .b = HeadsOf(now.xbc, 0, groups_, state_),
          .c = HeadsOf(now.xbc, bc_columns(), groups_, state_),
          .dt = now.dt,
          .a = now.a,
          .skip = skip_,
          .ages = step.geometry.Ages(ctx),
          .segments = SegmentsOf(step.geometry),
          .chunk = chunk_};
}

// A group whose columns are spread over ranks is normalised by their sum: each rank adds its own to the place
// of its group.
GatedNorm MambaMixer::NormOf(Context& ctx, ModelStep& step, const Activations& now) const {
  GatedNorm norm{.x = now.y,
                 .gate = Columns(now.proj, conv_columns(), inner()),
                 .w = norm_,
                 .groups = groups_,
                 .eps = eps_,
                 .kind = Gate::kSiluBefore};
  if (shared_ranks_ == 1) return norm;
  norm.group_columns = inner() * shared_ranks_;
  norm.sum_over_ranks = [&ctx, &step, groups = all_groups_, shared = shared_ranks_](TensorRef sums) {
    ArenaScope scope(ctx.scratch);
    const int64_t mine = step.tensor.rank() / shared, tokens = sums.dim(0),
                  columns = sums.elements() / tokens;
    const TensorRef all = ctx.scratch.Allocate(sums.dtype(), {tokens, 1, groups * columns});
    const TensorRef own = sums.Reshaped({tokens, 1, columns});
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, all));
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, own, {{0, mine * columns, columns}}, Write::kOverwrite, all));
    ANNULUS_RETURN_IF_ERROR(step.tensor.AllReduce(all));
    return MoveColumns(ctx, all, {{mine * columns, 0, columns}}, Write::kOverwrite, own);
  };
  return norm;
}

MatrixRef MambaMixer::Columns(TensorRef proj, int64_t begin, int64_t count) const {
  return MatrixRef(proj).Cols(begin, begin + count);
}

absl::Status MambaMixer::ProjectBcx(Context& ctx, ConstTensorRef x, MatrixRef to) const {
  if (w_.bcx.defined()) return LinearForward(ctx, x, w_.bcx, Write::kOverwrite, to.Cols(0, conv_columns()));
  const int64_t bc = bc_columns();
  ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w_.b, Write::kOverwrite, to.Cols(0, bc)));
  ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w_.c, Write::kOverwrite, to.Cols(bc, 2 * bc)));
  return LinearForward(ctx, x, w_.x, Write::kOverwrite, to.Cols(2 * bc, conv_columns()));
}

// All but z, which is projected while states travel. Halos that are known from before are not exchanged
// again.
absl::Status MambaMixer::Project(Context& ctx, ModelStep& step, ConstTensorRef x,
                                 const Activations& to) const {
  ArenaScope scope(ctx.scratch);
  HaloExchange exchange;
  if (!saved_.halo.defined()) {
    const auto project = [&](ConstTensorRef rows, MatrixRef edges) { return ProjectBcx(ctx, rows, edges); };
    ANNULUS_ASSIGN_OR_RETURN(exchange, short_conv_.StartHalo(ctx, step, x, project, to.halo));
  }
  absl::Status status = ProjectBcx(ctx, x, MatrixRef(to.proj));
  if (status.ok()) {
    status =
        LinearForward(ctx, x, w_.dt, Write::kOverwrite, Columns(to.proj, conv_columns() + inner(), heads_));
  }
  status.Update(exchange.Finish(ctx));
  return status;
}

absl::Status MambaMixer::Convolve(Context& ctx, ModelStep& step, const Activations& now) const {
  ANNULUS_RETURN_IF_ERROR(short_conv_.Forward(ctx, step, now.proj, now.halo, now.xbc));
  return MambaGatesForward(
      ctx, {Columns(now.proj, conv_columns() + inner(), heads_), dt_bias_, a_log_, dt_min_, dt_max_},
      now.dt.Reshaped({step.tokens(), heads_}), now.a.Reshaped({step.tokens(), heads_}));
}

absl::Status MambaMixer::Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) {
  const bool keeping = keep == Keep::kForBackward;
  saved_ = {};
  Activations now;
  ArenaScope scope(ctx.scratch);
  Arena& products = keeping && KeepsProducts() ? ctx.saved : ctx.scratch;
  Arena& elementwise = keeping && recompute_ == Recompute::kNone ? ctx.saved : ctx.scratch;
  Arena& exchanged = keeping ? ctx.saved : ctx.scratch;
  AllocateProducts(products, step, &now);
  AllocateConvolved(elementwise, step, &now);
  now.halo = short_conv_.AllocateHalo(exchanged, step, x.dtype());
  const Ssd scan = ScanOf(ctx, step, now);
  now.initial = AllocateSegmentStates(exchanged, scan);
  now.states = AllocateStates(elementwise, scan);

  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
  ANNULUS_RETURN_IF_ERROR(Project(ctx, step, all, now));
  ANNULUS_RETURN_IF_ERROR(Convolve(ctx, step, now));
  const auto project_z = [&] {
    return LinearForward(ctx, all, w_.z, Write::kOverwrite, Columns(now.proj, conv_columns(), inner()));
  };
  ANNULUS_RETURN_IF_ERROR(
      ScanForward(ctx, step, scan, now.initial, now.states, project_z, HeadsOf(now.y, 0, heads_, head_dim_)));
  const TensorRef gated = ctx.scratch.Allocate(x.dtype(), {step.tokens(), inner()});
  ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, NormOf(ctx, step, now), gated));
  ANNULUS_RETURN_IF_ERROR(step.tensor.RowParallelForward(ctx, gated, out_, Write::kAccumulate, y));
  if (!keeping) return absl::OkStatus();
  saved_.halo = now.halo, saved_.initial = now.initial;
  if (KeepsProducts()) saved_.proj = now.proj, saved_.y = now.y;
  if (recompute_ == Recompute::kNone) {
    saved_.xbc = now.xbc, saved_.dt = now.dt, saved_.a = now.a, saved_.states = now.states;
  }
  return absl::OkStatus();
}

// What forward did not keep. Neither halos nor states are exchanged again: they are kept in any case.
absl::Status MambaMixer::Recomputed(Context& ctx, ModelStep& step, ConstTensorRef x, Activations* now) const {
  *now = saved_;
  const bool project = !now->proj.defined(), convolve = !now->xbc.defined();
  if (project) AllocateProducts(ctx.scratch, step, now);
  if (convolve) AllocateConvolved(ctx.scratch, step, now);
  if (project) {
    ANNULUS_RETURN_IF_ERROR(Project(ctx, step, x, *now));
    ANNULUS_RETURN_IF_ERROR(
        LinearForward(ctx, x, w_.z, Write::kOverwrite, Columns(now->proj, conv_columns(), inner())));
  }
  if (!convolve) return absl::OkStatus();
  ANNULUS_RETURN_IF_ERROR(Convolve(ctx, step, *now));
  const Ssd scan = ScanOf(ctx, step, *now);
  now->states = AllocateStates(ctx.scratch, scan);
  return ScanAgain(ctx, scan, now->initial, now->states, HeadsOf(now->y, 0, heads_, head_dim_));
}

absl::Status MambaMixer::Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                                  TensorRef dx) {
  ArenaScope scope(ctx.scratch);
  const DType dtype = x.dtype(), accum = AccumOf(dtype);
  const int64_t tokens = step.tokens(), rows = step.rows(), batch = step.batch();
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all, step.tensor.Gather(ctx, x));
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef dy_all, step.tensor.Gather(ctx, dy));
  Activations now;
  ANNULUS_RETURN_IF_ERROR(Recomputed(ctx, step, all, &now));

  const TensorRef dproj = ctx.scratch.Allocate(dtype, now.proj.shape());
  const TensorRef dscan = ctx.scratch.Allocate(dtype, now.y.shape());
  const TensorRef gated = ctx.scratch.Allocate(dtype, {tokens, inner()});
  const TensorRef dgated = ctx.scratch.Allocate(dtype, {tokens, inner()});
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dy_all, out_, Write::kOverwrite, dgated));
  const GatedNorm norm = NormOf(ctx, step, now);
  ANNULUS_RETURN_IF_ERROR(GatedNormForward(ctx, norm, gated));
  ANNULUS_RETURN_IF_ERROR(
      GatedNormBackward(ctx, norm, dgated, dscan, Columns(dproj, conv_columns(), inner()), dnorm_));

  const TensorRef dxbc = ctx.scratch.Allocate(dtype, now.xbc.shape());
  const TensorRef ddt = ctx.scratch.Allocate(accum, {rows, batch, heads_});
  const TensorRef da = ctx.scratch.Allocate(accum, {rows, batch, heads_});
  ANNULUS_RETURN_IF_ERROR(ScanBackward(ctx, step, ScanOf(ctx, step, now),
                                       HeadsOf(dscan, 0, heads_, head_dim_), now.states,
                                       [&] { return LinearBackwardWeight(ctx, dy_all, gated, dout_); },
                                       {.dx = HeadsOf(dxbc, 2 * bc_columns(), heads_, head_dim_),
                                        .db = HeadsOf(dxbc, 0, groups_, state_),
                                        .dc = HeadsOf(dxbc, bc_columns(), groups_, state_),
                                        .ddt = ddt,
                                        .da = da,
                                        .dskip = dskip_}));
  ANNULUS_RETURN_IF_ERROR(MambaGatesBackward(
      ctx, {Columns(now.proj, conv_columns() + inner(), heads_), dt_bias_, a_log_, dt_min_, dt_max_},
      ddt.Reshaped({tokens, heads_}), da.Reshaped({tokens, heads_}),
      Columns(dproj, conv_columns() + inner(), heads_), ddt_bias_, da_log_));
  const auto zdt_weights = [&] {
    return LinearBackwardWeight(ctx, Columns(dproj, conv_columns(), inner() + heads_), all, dw_.zdt);
  };
  ANNULUS_RETURN_IF_ERROR(short_conv_.Backward(ctx, step, now.proj, now.halo, dxbc, zdt_weights, dproj));
  return ProjectBackward(ctx, step, all, dproj, dx);
}

// All but the gradients of the weights of z and dt.
absl::Status MambaMixer::ProjectBackward(Context& ctx, ModelStep& step, ConstTensorRef x, TensorRef dproj,
                                         TensorRef dx) const {
  const int64_t bc = bc_columns();
  struct Product {
    TensorRef w, dw;
    int64_t begin, columns;
  };
  std::vector<Product> products;
  if (w_.bcx.defined()) {
    products.push_back({w_.bcx, dw_.bcx, 0, conv_columns()});
  } else {
    products.push_back({w_.b, dw_.b, 0, bc});
    products.push_back({w_.c, dw_.c, bc, bc});
    products.push_back({w_.x, dw_.x, 2 * bc, inner()});
  }
  const TensorRef partial = step.tensor.Partial(ctx, dx);
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, Columns(dproj, conv_columns(), inner() + heads_), w_.zdt,
                                              step.tensor.PartialWrite(dx, Write::kOverwrite), partial));
  for (const Product& p : products) {
    ANNULUS_RETURN_IF_ERROR(
        LinearBackwardInput(ctx, Columns(dproj, p.begin, p.columns), p.w, Write::kAccumulate, partial));
  }
  ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dx));
  absl::Status status;
  for (const Product& p : products) {
    if (status.ok()) status = LinearBackwardWeight(ctx, Columns(dproj, p.begin, p.columns), x, p.dw);
  }
  ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
  return status;
}

}  // namespace

std::unique_ptr<SequenceMixer> MakeMamba(const MixerArgs& args) { return std::make_unique<MambaMixer>(args); }

}  // namespace annulus
