#include "annulus/parallel/context_attention.h"

#include <algorithm>

#include "annulus/ops/elementwise.h"

namespace annulus {
namespace {

// Keys and values inside a KV block (or their gradients inside a gradient block).
template <typename Byte>
struct KvHeads {
  BasicHeadsRef<Byte> k, v;
};

template <typename Byte>
KvHeads<Byte> SplitKv(const BasicTensorRef<Byte>& kv, const ContextAttentionShape& shape) {
  return {HeadsOf(kv, 0, shape.kv_heads, shape.head_dim),
          HeadsOf(kv, shape.kv_heads * shape.head_dim, shape.kv_heads, shape.v_head_dim)};
}

// Global positions of key rows [keys.begin, keys.end) of one chunk.
KeyPositions PositionsOf(const AttentionGeometry& geometry, const ExchangeProblem& problem,
                         const BlockPair& pair) {
  const size_t chunks_per_rank = problem.chunks.size() / static_cast<size_t>(problem.ranks);
  const size_t kv_chunk = static_cast<size_t>(pair.kv_chunk);
  const LayoutChunk chunk =
      geometry.layout().chunks(problem.chunks[kv_chunk].owner)[kv_chunk % chunks_per_rank];
  return {chunk.position + chunk.stride * (pair.keys.begin - chunk.row), chunk.stride};
}

// The home slot is the caller's tensor; the others come from scratch.
ExchangeBinding BindSlots(Context& ctx, const RankPlan& plan, TensorRef home_kv, TensorRef home_grad) {
  ExchangeBinding binding;
  for (const SlotSpec& slot : plan.slots) {
    const TensorRef like = slot.payload == Payload::kKv ? home_kv : home_grad;
    TensorRef memory = slot.home ? like : ctx.scratch.Allocate(like.dtype(), like.shape());
    binding.slots.push_back(memory.Reshaped({like.dim(0), like.dim(1) * like.dim(2)}));
  }
  return binding;
}

struct Pair {
  AttentionBlock block;
  RowRange q_rows;
};

// Kernel arguments of one block pair of a step.
Pair MakePair(const AttentionGeometry& geometry, const AttentionGeometry::Mask& mask,
              const ExchangeProblem& problem, const ContextAttentionShape& shape, ConstHeadsRef q,
              const KvHeads<void>& kv, const BlockPair& pair) {
  const RowRange rows = problem.chunks[static_cast<size_t>(pair.q_chunk)].rows;
  AttentionBlock block{.q = q.Rows(rows.begin, rows.end),
                       .k = kv.k.Rows(pair.keys.begin, pair.keys.end),
                       .v = kv.v.Rows(pair.keys.begin, pair.keys.end),
                       .bounds = mask.bounds.Rows(rows.begin, rows.end, q.batch),
                       .key_positions = PositionsOf(geometry, problem, pair),
                       .scale = shape.scale};
  return {block, rows};
}

}  // namespace

void AttentionGeometry::SetBatch(SequenceBatch sequences) {
  const bool same_masks = !positions_.empty() && sequences_.document_starts.empty() &&
                          sequences.document_starts.empty() && sequences_.batch == sequences.batch &&
                          sequences_.lengths == sequences.lengths;
  if (!same_masks) masks_.clear();
  if (positions_.empty()) positions_ = layout_.LocalPositions(cp_.rank());
  sequences_ = std::move(sequences);
}

absl::StatusOr<const AttentionGeometry::Mask*> AttentionGeometry::MaskFor(int64_t window) {
  if (auto found = masks_.find(window); found != masks_.end()) return &found->second;
  Mask mask;
  mask.bounds = LocalBounds(layout_, sequences_, window, cp_.rank());
  const ExchangeProblem problem = MakeExchangeProblem(layout_, sequences_, window);
  mask.forward = BuildKvRing(problem, Pass::kForward);
  mask.backward = BuildKvRing(problem, Pass::kBackward);
  ANNULUS_RETURN_IF_ERROR(AgreeOnPlan(mask.forward, cp_));
  ANNULUS_RETURN_IF_ERROR(AgreeOnPlan(mask.backward, cp_));
  return &masks_.emplace(window, std::move(mask)).first->second;
}

absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape, ConstHeadsRef q, TensorRef kv,
                                     const AttentionPartial& partial, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const AttentionGeometry::Mask* mask, geometry.MaskFor(shape.window));
  ANNULUS_RETURN_IF_ERROR(ResetPartial(ctx, partial));
  ArenaScope scope(ctx.scratch);
  const ExchangePlan& plan = mask->forward;
  ExchangeBinding binding =
      BindSlots(ctx, plan.ranks[static_cast<size_t>(geometry.cp().rank())], kv, TensorRef());
  binding.attend = [&](const Step& step) -> absl::Status {
    const TensorRef slot = binding.slots[static_cast<size_t>(step.slot)].Reshaped(kv.shape());
    const KvHeads<void> heads = SplitKv(slot, shape);
    for (const BlockPair& item : step.pairs) {
      const Pair pair = MakePair(geometry, *mask, plan.problem, shape, q, heads, item);
      ANNULUS_RETURN_IF_ERROR(
          AttentionForward(ctx, pair.block,
                           {.out = partial.out.Rows(pair.q_rows.begin, pair.q_rows.end),
                            .lse = partial.lse.Rows(pair.q_rows.begin, pair.q_rows.end)}));
    }
    return absl::OkStatus();
  };
  return Execute(ctx, plan, geometry.cp(), binding, stats);
}

absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape, ConstHeadsRef q, TensorRef kv,
                                      const ContextAttentionGradients& gradients, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const AttentionGeometry::Mask* mask, geometry.MaskFor(shape.window));
  ArenaScope scope(ctx.scratch);
  const TensorRef delta = ctx.scratch.Allocate(gradients.dq.dtype, gradients.lse.shape());
  ANNULUS_RETURN_IF_ERROR(AttentionDelta(ctx, gradients.out, gradients.dout, delta));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, gradients.dkv));
  const ExchangePlan& plan = mask->backward;
  ExchangeBinding binding =
      BindSlots(ctx, plan.ranks[static_cast<size_t>(geometry.cp().rank())], kv, gradients.dkv);
  binding.attend = [&](const Step& step) -> absl::Status {
    const TensorRef grad_slot = binding.slots[static_cast<size_t>(step.grad_slot)];
    if (step.grad_write == GradWrite::kOverwrite) {
      ANNULUS_RETURN_IF_ERROR(Zero(ctx, grad_slot.Rows(step.rows.begin, step.rows.end)));
    }
    const KvHeads<void> heads =
        SplitKv(binding.slots[static_cast<size_t>(step.slot)].Reshaped(kv.shape()), shape);
    const KvHeads<void> grads = SplitKv(grad_slot.Reshaped(kv.shape()), shape);
    for (const BlockPair& item : step.pairs) {
      const Pair pair = MakePair(geometry, *mask, plan.problem, shape, q, heads, item);
      const RowRange rows = pair.q_rows;
      ANNULUS_RETURN_IF_ERROR(AttentionBackward(ctx, pair.block,
                                                {.dout = gradients.dout.Rows(rows.begin, rows.end),
                                                 .lse = gradients.lse.Rows(rows.begin, rows.end),
                                                 .delta = delta.Rows(rows.begin, rows.end),
                                                 .dq = gradients.dq.Rows(rows.begin, rows.end),
                                                 .dk = grads.k.Rows(item.keys.begin, item.keys.end),
                                                 .dv = grads.v.Rows(item.keys.begin, item.keys.end)}));
    }
    return absl::OkStatus();
  };
  return Execute(ctx, plan, geometry.cp(), binding, stats);
}

}  // namespace annulus
