// Multi-head latent attention (DeepSeek-V2, 2024) and its tensor-parallel form, TPLA: g branches, each with
// its part of the latent and a softmax of its own, whose outputs are averaged. g = 1 is MLA.
//
//   c_q = RMS(q_down x)   [c_b] = [RMS_b(kv_down_b x)]   r = RoPE(k_rope x)
//   q = q_up c_q, its last rope_dim elements of a head turned     [n_b | v_b] = kv_up_b c_b
//   o = mean over b of softmax(tau q [n_b | r]^T) v_b     y += W_o o
//
// Tensor parallelism: the latents of all tokens are gathered, not x (latent_projection.h). Ranks are head
// groups x latent groups (LatentShard): a rank projects the queries of its H / tp heads, attends for all
// heads of its head group over the branches of its latent group, and gets the sum over branches for its own
// heads back (head_group.h).
//
// Keys and values are expanded from the latents by each pass anew, for they are many times as large; where a
// sequence is split, by each rank that the latents come to (annulus/parallel/context_attention.h).

#include <cmath>

#include "annulus/model/mixer.h"
#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "head_group.h"
#include "latent_projection.h"
#include "timed_attention.h"

namespace annulus {
namespace {

double SoftmaxScale(const ModelSpec& spec) {
  const RopeScaling& scaling = spec.rope_scaling;
  const bool yarn = scaling.kind == RopeScalingKind::kYarn;
  const double m = yarn ? YarnScale(scaling.factor, scaling.mscale_all_dim) : 1;
  return m * m / std::sqrt(static_cast<double>(spec.latent.nope_dim + spec.latent.rope_dim));
}

ContextAttentionShape ShapeOf(const MixerArgs& args) {
  const LatentSpec& latent = args.spec.latent;
  const int64_t groups = args.branch_spec().latent_groups;
  return {.heads = latent.heads / LatentShardOf(args.shard, groups).head_groups,
          .kv_heads = 1,
          .head_dim = latent.nope_dim + latent.rope_dim,
          .v_head_dim = latent.v_dim,
          .window = args.branch_spec().window,
          .scale = SoftmaxScale(args.spec),
          .latent = LatentShape{.columns = latent.kv_rank / groups,
                                .nope = latent.nope_dim,
                                .rope = latent.rope_dim,
                                .v = latent.v_dim}};
}

class LatentMixer : public SequenceMixer {
 public:
  explicit LatentMixer(const MixerArgs& args)
      : recompute_(args.recompute),
        projection_(args),
        mesh_(LatentShardOf(args.shard, args.branch_spec().latent_groups)),
        groups_(args.branch_spec().latent_groups),
        class_{.branch = BranchKind::kLatentAttention,
               .window = args.branch_spec().window,
               .latent_groups = groups_},
        own_heads_(args.spec.latent.heads / args.shard.size),
        rope_(RopeOf(args.spec, args.branch_spec(), args.spec.latent.rope_dim)),
        shape_(ShapeOf(args)) {
    const ParamTable& table = args.params.table();
    const int q_up = table.IndexOf(args.prefix() + "q_up.weight");
    const int o = table.IndexOf(args.prefix() + "o.weight");
    q_up_ = args.params.Value(q_up), dq_up_ = args.params.Grad(q_up);
    o_ = args.params.Value(o), do_ = args.params.Grad(o);
    for (int64_t b = 0; b < groups_; ++b) {
      if (!mesh_.Holds(b)) continue;
      const int kv_up = table.IndexOf(absl::StrCat(args.prefix(), "kv_up.", b, ".weight"));
      branches_.push_back({.column = projection_.BranchBegin(b),
                           .kv_up = args.params.Value(kv_up),
                           .dkv_up = args.params.Grad(kv_up)});
    }
  }

  absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) override {
    const bool keeping = keep == Keep::kForBackward;
    saved_ = {};
    const bool keep_output = keeping && recompute_ != Recompute::kBlock;
    const bool keep_products =
        keeping && (recompute_ == Recompute::kNone || recompute_ == Recompute::kElementwise);
    ArenaScope scope(ctx.scratch);
    Activations now;
    AllocateOutput(keep_output ? ctx.saved : ctx.scratch, step, &now);
    if (keep_products) now.q = AllocateQ(ctx.saved, step);
    Arena& products = keep_products ? ctx.saved : ctx.scratch;
    ANNULUS_ASSIGN_OR_RETURN(now.products, projection_.Project(ctx, step, products, x));
    if (keeping && recompute_ == Recompute::kNone) now.packed = AllocatePacked(ctx.saved, x);
    ANNULUS_ASSIGN_OR_RETURN(const Gathered all, GatherLatents(ctx, step, x, &now));
    ANNULUS_RETURN_IF_ERROR(ProjectQueries(ctx, step, all, &now));
    ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, all, &now));
    ANNULUS_RETURN_IF_ERROR(step.tensor.RowParallelForward(ctx, now.mean, o_, Write::kAccumulate, y));
    if (keep_output) saved_.outputs = now.outputs, saved_.mean = now.mean;
    if (keep_products) saved_.q = now.q, saved_.products = now.products;
    if (keeping && recompute_ == Recompute::kNone) saved_.packed = now.packed;
    return absl::OkStatus();
  }

  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                        TensorRef dx) override {
    ArenaScope scope(ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(PendingTokens gathering_dy, step.tensor.StartGather(ctx, dy));
    Activations now = saved_;
    if (!now.products.defined()) {
      ANNULUS_ASSIGN_OR_RETURN(now.products, projection_.Project(ctx, step, ctx.scratch, x));
    }
    ANNULUS_ASSIGN_OR_RETURN(const Gathered all, GatherLatents(ctx, step, x, &now));
    if (!now.q.defined()) ANNULUS_RETURN_IF_ERROR(ProjectQueries(ctx, step, all, &now));
    if (!now.mean.defined()) {
      AllocateOutput(ctx.scratch, step, &now);
      ANNULUS_RETURN_IF_ERROR(Attend(ctx, step, all, &now));
    }
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_dy, gathering_dy.Finish(ctx));
    const TensorRef dmean = ctx.scratch.Allocate(x.dtype(), now.mean.shape());
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, all_dy, o_, Write::kOverwrite, dmean));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, all_dy, now.mean, do_));

    // Sums over branches, ranks and heads: rounded once, behind all of them.
    const TensorRef dpacked = ctx.scratch.Allocate(AccumOf(x.dtype()), {x.dim(0), projection_.columns()});
    const TensorRef partial = step.tensor.Partial(ctx, dpacked);
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef dq, AttendBackward(ctx, step, all, now, dmean, partial));
    Write write = Write::kOverwrite;
    PendingSum dx_sum;
    if (projection_.q_rank() == 0) {
      const TensorRef dx_partial = step.tensor.Partial(ctx, dx);
      ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dq, q_up_, Write::kOverwrite, dx_partial));
      ANNULUS_ASSIGN_OR_RETURN(dx_sum, step.tensor.StartSum(ctx, dx_partial, Write::kOverwrite, dx));
      write = Write::kAccumulate;
    } else {
      const MatrixRef columns = MatrixRef(partial).Cols(0, projection_.q_rank());
      ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dq, q_up_, Write::kOverwrite, columns));
    }
    ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, step.tensor.StartSum(ctx, partial, Write::kOverwrite, dpacked));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dq, all.query_input, dq_up_));
    ANNULUS_RETURN_IF_ERROR(dx_sum.Finish(ctx));
    ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
    return projection_.Backward(ctx, step, x, now.products, dpacked, write, dx);
  }

 private:
  // A branch of the latent that this rank attends over.
  struct Branch {
    int64_t column;  // of the packed latents
    TensorRef kv_up, dkv_up;
  };
  struct Output {
    TensorRef out, lse;  // [rows, batch, heads * v], [rows, batch, heads] of the head group
  };
  struct Activations {
    LatentProducts products;      // of this rank's tokens
    TensorRef packed;             // of this rank's tokens, [tokens / tp, columns]
    TensorRef q;                  // after RoPE, of the head group
    std::vector<Output> outputs;  // by branch here
    TensorRef mean;               // [rows, batch, own heads * v]
  };
  // Of all tokens.
  struct Gathered {
    ConstTensorRef packed;       // [tokens, columns]
    ConstMatrixRef query_input;  // c_q, or x where queries are not compressed
  };

  TensorRef AllocatePacked(Arena& arena, ConstTensorRef x) const {
    return arena.Allocate(x.dtype(), {x.dim(0), projection_.columns()});
  }
  TensorRef AllocateQ(Arena& arena, const ModelStep& step) const {
    return arena.Allocate(o_.dtype(), {step.rows(), step.batch(), shape_.heads * shape_.head_dim});
  }
  bool MeanIsOutput() const { return groups_ == 1; }
  void AllocateOutput(Arena& arena, const ModelStep& step, Activations* to) const {
    const auto allocate = [&](DType dtype, int64_t columns) {
      return arena.Allocate(dtype, {step.rows(), step.batch(), columns});
    };
    for (size_t b = 0; b < branches_.size(); ++b) {
      to->outputs.push_back({.out = allocate(o_.dtype(), shape_.heads * shape_.v_head_dim),
                             .lse = allocate(AccumOf(o_.dtype()), shape_.heads)});
    }
    to->mean = MeanIsOutput() ? to->outputs[0].out : allocate(o_.dtype(), own_heads_ * shape_.v_head_dim);
  }

  absl::StatusOr<Gathered> GatherLatents(Context& ctx, ModelStep& step, ConstTensorRef x,
                                         Activations* now) const {
    if (!saved_.packed.defined()) {
      if (!now->packed.defined()) now->packed = AllocatePacked(ctx.scratch, x);
      ANNULUS_RETURN_IF_ERROR(projection_.Normalize(ctx, now->products, now->packed));
    }
    Gathered all;
    ANNULUS_ASSIGN_OR_RETURN(all.packed, step.tensor.Gather(ctx, now->packed));
    all.query_input = ConstMatrixRef(all.packed).Cols(0, projection_.q_rank());
    if (projection_.q_rank() > 0) return all;
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef all_x, step.tensor.Gather(ctx, x));
    all.query_input = all_x;
    return all;
  }

  absl::Status Rotate(Context& ctx, ModelStep& step, RopeDirection direction, TensorRef q) const {
    if (!rope_.has_value()) return absl::OkStatus();
    return Rope(ctx, step.geometry.Positions(ctx), *rope_, direction,
                HeadsOf(q, 0, own_heads_, shape_.head_dim), shape_.latent->nope);
  }

  absl::Status ProjectQueries(Context& ctx, ModelStep& step, const Gathered& all, Activations* now) const {
    const bool whole = mesh_.latent_groups == 1;
    if (whole && !now->q.defined()) now->q = AllocateQ(ctx.scratch, step);
    const TensorRef own =
        whole ? now->q
              : ctx.scratch.Allocate(o_.dtype(), {step.rows(), step.batch(), own_heads_ * shape_.head_dim});
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, all.query_input, q_up_, Write::kOverwrite, own));
    ANNULUS_RETURN_IF_ERROR(Rotate(ctx, step, RopeDirection::kForward, own));
    if (whole) return absl::OkStatus();
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef q, GatherHeads(ctx, step, mesh_.latent_groups, own));
    if (now->q.defined()) return Copy(ctx, q, now->q);
    now->q = q;
    return absl::OkStatus();
  }

  // The branch's latents with the shared key part behind them, [rows, batch, columns + rope] in ctx.scratch.
  absl::StatusOr<TensorRef> LatentsOf(Context& ctx, ModelStep& step, const Gathered& all,
                                      const Branch& branch) const {
    const int64_t width = projection_.width();
    const TensorRef latents =
        ctx.scratch.Allocate(o_.dtype(), {step.rows(), step.batch(), shape_.latent->row()});
    const ColumnRun runs[] = {{.from = branch.column, .to = 0, .columns = width},
                              {.from = projection_.RopeBegin(), .to = width, .columns = shape_.latent->rope}};
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, WithBatch(step, all.packed), runs, Write::kOverwrite, latents));
    return latents;
  }
  template <typename Ref>
  static Ref WithBatch(const ModelStep& step, const Ref& x) {
    return x.Reshaped({step.rows(), step.batch(), x.dim(1)});
  }

  absl::Status Attend(Context& ctx, ModelStep& step, const Gathered& all, Activations* now) const {
    for (size_t b = 0; b < branches_.size(); ++b) {
      ArenaScope scope(ctx.scratch);
      const Output& to = now->outputs[b];
      ANNULUS_ASSIGN_OR_RETURN(const TensorRef latents, LatentsOf(ctx, step, all, branches_[b]));
      ANNULUS_RETURN_IF_ERROR(Timed(ctx, step, class_, Pass::kForward, [&] {
        return ContextAttentionForward(
            ctx, step.geometry, shape_,
            {.q = now->q, .kv = latents, .out = to.out, .lse = to.lse, .latent = {.up = branches_[b].kv_up}},
            &step.stats);
      }));
    }
    return MeanIsOutput() ? absl::OkStatus() : Average(ctx, step, *now);
  }

  // The mean over the branches of all ranks, for this rank's heads.
  absl::Status Average(Context& ctx, ModelStep& step, const Activations& now) const {
    ArenaScope scope(ctx.scratch);
    TensorRef sum = now.outputs[0].out;
    if (now.outputs.size() > 1) {
      sum = ctx.scratch.Allocate(sum.dtype(), sum.shape());
      ANNULUS_RETURN_IF_ERROR(Copy(ctx, now.outputs[0].out, sum));
      for (size_t b = 1; b < now.outputs.size(); ++b)
        ANNULUS_RETURN_IF_ERROR(AddInPlace(ctx, now.outputs[b].out, sum));
    }
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef own, SumHeads(ctx, step, mesh_.latent_groups, sum));
    ANNULUS_RETURN_IF_ERROR(Copy(ctx, own, now.mean));
    return Scale(ctx, 1.0 / static_cast<double>(groups_), now.mean);
  }

  // The gradient of this rank's queries before RoPE. Writes its summand of that of the packed latents, but
  // for the columns of c_q.   dmean: scaled in place
  absl::StatusOr<TensorRef> AttendBackward(Context& ctx, ModelStep& step, const Gathered& all,
                                           const Activations& now, TensorRef dmean, TensorRef dpacked) const {
    if (groups_ > 1) ANNULUS_RETURN_IF_ERROR(Scale(ctx, 1.0 / static_cast<double>(groups_), dmean));
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef dout, GatherHeads(ctx, step, mesh_.latent_groups, dmean));
    const DType accum = AccumOf(o_.dtype());
    const TensorRef dq = ctx.scratch.Allocate(o_.dtype(), now.q.shape());
    const TensorRef dk_rope = ctx.scratch.Allocate(accum, {step.rows(), step.batch(), shape_.latent->rope});
    if (branches_.size() < static_cast<size_t>(groups_)) ANNULUS_RETURN_IF_ERROR(Zero(ctx, dpacked));
    for (size_t b = 0; b < branches_.size(); ++b) {
      ArenaScope scope(ctx.scratch);
      const TensorRef dq_b = b == 0 ? dq : ctx.scratch.Allocate(dq.dtype(), dq.shape());
      ANNULUS_RETURN_IF_ERROR(BranchBackward(ctx, step, all, now, b, dout, dq_b, dk_rope, dpacked));
      if (b > 0) ANNULUS_RETURN_IF_ERROR(AddInPlace(ctx, dq_b, dq));
    }
    const ColumnRun run{.from = 0, .to = projection_.RopeBegin(), .columns = dk_rope.dim(2)};
    ANNULUS_RETURN_IF_ERROR(
        MoveColumns(ctx, dk_rope, {&run, 1}, Write::kOverwrite, WithBatch(step, dpacked)));
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef own, SumHeads(ctx, step, mesh_.latent_groups, dq));
    ANNULUS_RETURN_IF_ERROR(Rotate(ctx, step, RopeDirection::kGradient, own));
    return own;
  }

  absl::Status BranchBackward(Context& ctx, ModelStep& step, const Gathered& all, const Activations& now,
                              size_t b, TensorRef dout, TensorRef dq, TensorRef dk_rope,
                              TensorRef dpacked) const {
    const Branch& branch = branches_[b];
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef latents, LatentsOf(ctx, step, all, branch));
    const TensorRef dlatents = ctx.scratch.Allocate(dk_rope.dtype(), latents.shape());
    ANNULUS_RETURN_IF_ERROR(Timed(ctx, step, class_, Pass::kBackward, [&] {
      return ContextAttentionBackward(ctx, step.geometry, shape_,
                                      {.q = now.q,
                                       .kv = latents,
                                       .out = now.outputs[b].out,
                                       .lse = now.outputs[b].lse,
                                       .dout = dout,
                                       .dq = dq,
                                       .dkv = dlatents,
                                       .latent = {.up = branch.kv_up, .dup = branch.dkv_up}},
                                      &step.stats);
    }));
    const int64_t width = projection_.width();
    const ColumnRun latent{.from = 0, .to = branch.column, .columns = width};
    const ColumnRun rope{.from = width, .to = 0, .columns = dk_rope.dim(2)};
    const Write write = b == 0 ? Write::kOverwrite : Write::kAccumulate;
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, dlatents, {&rope, 1}, write, dk_rope));
    return MoveColumns(ctx, dlatents, {&latent, 1}, Write::kOverwrite, WithBatch(step, dpacked));
  }

  Recompute recompute_;
  LatentProjection projection_;
  LatentShard mesh_;
  int64_t groups_;  // branches of the latent on all ranks
  AttentionClass class_;
  int64_t own_heads_;
  std::optional<RopeFrequencies> rope_;
  ContextAttentionShape shape_;  // of the head group, for one branch
  TensorRef q_up_, dq_up_, o_, do_;
  std::vector<Branch> branches_;  // here
  Activations saved_;             // of the forward in flight
};

}  // namespace

std::unique_ptr<SequenceMixer> MakeLatentAttention(const MixerArgs& args) {
  return std::make_unique<LatentMixer>(args);
}

}  // namespace annulus
