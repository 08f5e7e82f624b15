#include "annulus/parallel/context_attention.h"

#include <algorithm>

#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"

namespace annulus {
namespace {

// Keys and values inside a KV block (or their gradients inside a gradient block).
struct KvHeads {
  HeadsRef k, v;
};

KvHeads SplitKv(const TensorRef& kv, const ContextAttentionShape& shape) {
  return {HeadsOf(kv, 0, shape.kv_heads, shape.head_dim),
          HeadsOf(kv, shape.kv_heads * shape.head_dim, shape.kv_heads, shape.v_head_dim)};
}

AttentionBlock BlockOf(const AttendCall& call, const AttentionGeometry::Mask& mask,
                       const ContextAttentionShape& shape, TensorRef q, const KvHeads& kv) {
  return {.q = HeadsOf(q, 0, shape.heads, shape.head_dim).Rows(call.q_rows.begin, call.q_rows.end),
          .k = kv.k.Rows(call.keys.begin, call.keys.end),
          .v = kv.v.Rows(call.keys.begin, call.keys.end),
          .bounds = mask.on_device.Of(call),
          .mask_shape = call.shape,
          .key_positions = call.key_positions,
          .scale = shape.scale};
}

// Memory like the result in the accumulator dtype: the result itself where the dtypes are equal.
TensorRef AccumulatorFor(Context& ctx, TensorRef result) {
  const DType accum = AccumOf(result.dtype());
  return accum == result.dtype() ? result : ctx.scratch.Allocate(accum, result.shape());
}

absl::Status FinishAccumulator(Context& ctx, TensorRef accumulator, TensorRef result) {
  if (accumulator.raw() == result.raw()) return absl::OkStatus();
  return Cast(ctx, accumulator, result);
}

// Gradient arguments of one call; dq, dk and dv in whichever dtype the tensors have.
AttentionGradients GradientsOf(const AttendCall& call, const ContextAttentionShape& shape,
                               const ContextAttentionBackwardArgs& args, TensorRef delta, TensorRef dq,
                               const KvHeads& dkv) {
  const RowRange rows = call.q_rows;
  return {.out = HeadsOf(args.out, 0, shape.heads, shape.v_head_dim).Rows(rows.begin, rows.end),
          .dout = HeadsOf(args.dout, 0, shape.heads, shape.v_head_dim).Rows(rows.begin, rows.end),
          .lse = args.lse.Rows(rows.begin, rows.end),
          .delta = delta.Rows(rows.begin, rows.end),
          .dq = HeadsOf(dq, 0, shape.heads, shape.head_dim).Rows(rows.begin, rows.end),
          .dk = dkv.k.Rows(call.keys.begin, call.keys.end),
          .dv = dkv.v.Rows(call.keys.begin, call.keys.end)};
}

}  // namespace

void AttentionGeometry::SetBatch(SequenceBatch sequences) {
  const bool same_masks = sequences_.document_starts.empty() && sequences.document_starts.empty() &&
                          sequences_.batch == sequences.batch && sequences_.lengths == sequences.lengths &&
                          sequences_.visibility == sequences.visibility;
  if (!same_masks) {
    for (auto& [window, mask] : masks_) spare_bounds_.push_back(std::move(mask.on_device));
    masks_.clear();
  }
  sequences_ = std::move(sequences);
}

AttentionGeometry::Schedule AttentionGeometry::MakeSchedule(ExchangePlan plan,
                                                            const BoundsTable& bounds) const {
  Schedule schedule{.plan = std::move(plan), .calls = {}};
  const RankPlan& rank = schedule.plan.ranks[static_cast<size_t>(cp_.rank())];
  for (const Step& step : rank.steps) {
    schedule.calls.push_back(CallsOf(layout_, schedule.plan.problem, step, bounds, sequences_.batch));
  }
  // Decided for the group, whose ranks meet in the exchange.
  const bool alone = std::all_of(schedule.plan.ranks.begin(), schedule.plan.ranks.end(),
                                 [](const RankPlan& each) { return each.steps.size() == 1; });
  schedule.whole = alone && schedule.calls[0].size() == 1 &&
                   schedule.calls[0][0].q_rows == RowRange{0, layout_.local_rows()};
  return schedule;
}

absl::StatusOr<const AttentionGeometry::Mask*> AttentionGeometry::MaskFor(Context& ctx, int64_t window) {
  if (auto found = masks_.find(window); found != masks_.end()) return &found->second;
  Mask mask;
  mask.bounds = LocalBounds(layout_, sequences_, window, cp_.rank());
  const ExchangeProblem problem = MakeExchangeProblem(layout_, sequences_, window);
  mask.forward = MakeSchedule(BuildKvRing(problem, Pass::kForward), mask.bounds);
  mask.backward = MakeSchedule(BuildKvRing(problem, Pass::kBackward), mask.bounds);
  ANNULUS_RETURN_IF_ERROR(AgreeOnPlan(mask.forward.plan, cp_));
  ANNULUS_RETURN_IF_ERROR(AgreeOnPlan(mask.backward.plan, cp_));
  const auto fits = [&](const DeviceBounds& spare) {
    return spare.rows() == layout_.local_rows() && spare.batch() == sequences_.batch;
  };
  const auto spare = std::find_if(spare_bounds_.begin(), spare_bounds_.end(), fits);
  if (spare == spare_bounds_.end()) {
    mask.on_device = DeviceBounds(ctx.device, layout_.local_rows(), sequences_.batch);
  } else {
    mask.on_device = std::move(*spare);
    spare_bounds_.erase(spare);
  }
  mask.on_device.Fill(ctx, mask.bounds);
  return &masks_.emplace(window, std::move(mask)).first->second;
}

ConstTensorRef AttentionGeometry::Positions(Context& ctx) {
  if (!positions_.ref().defined()) {
    const std::vector<int64_t> positions = layout_.LocalPositions(cp_.rank());
    positions_ = Tensor(ctx.device, DType::kI64, {static_cast<int64_t>(positions.size())});
    Upload(ctx, positions.data(), positions_.ref().bytes(), positions_.ref());
  }
  return positions_.ref();
}

absl::StatusOr<ExchangeTransport*> AttentionGeometry::Transport(Context& ctx) {
  if (transport_ == nullptr) {
    ANNULUS_ASSIGN_OR_RETURN(transport_, MakeTransport(transport_kind_, cp_, ctx));
  }
  return transport_.get();
}

absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape,
                                     const ContextAttentionForwardArgs& args, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const AttentionGeometry::Mask* mask, geometry.MaskFor(ctx, shape.window));
  const AttentionGeometry::Schedule& schedule = mask->forward;
  ArenaScope scope(ctx.scratch);
  if (schedule.whole) {
    const AttentionBlock block = BlockOf(schedule.calls[0][0], *mask, shape, args.q, SplitKv(args.kv, shape));
    return AttentionForwardWhole(ctx, block, HeadsOf(args.out, 0, shape.heads, shape.v_head_dim), args.lse);
  }
  const TensorRef accumulator = AccumulatorFor(ctx, args.out);
  const AttentionPartial partial{.out = HeadsOf(accumulator, 0, shape.heads, shape.v_head_dim),
                                 .lse = args.lse};
  ANNULUS_RETURN_IF_ERROR(ResetPartial(ctx, partial));
  ANNULUS_ASSIGN_OR_RETURN(ExchangeTransport * transport, geometry.Transport(ctx));
  ExchangeBinding binding;
  ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport->Slots(ctx, schedule.plan, args.kv, TensorRef()));
  const Step* first = schedule.plan.ranks[static_cast<size_t>(geometry.cp().rank())].steps.data();
  binding.attend = [&](const Step& step) -> absl::Status {
    const KvHeads kv =
        SplitKv(binding.slots[static_cast<size_t>(step.slot)].Reshaped(args.kv.shape()), shape);
    for (const AttendCall& call : schedule.calls[static_cast<size_t>(&step - first)]) {
      ANNULUS_RETURN_IF_ERROR(AttentionForward(ctx, BlockOf(call, *mask, shape, args.q, kv),
                                               {.out = partial.out.Rows(call.q_rows.begin, call.q_rows.end),
                                                .lse = args.lse.Rows(call.q_rows.begin, call.q_rows.end)}));
    }
    return absl::OkStatus();
  };
  ANNULUS_RETURN_IF_ERROR(transport->Execute(ctx, schedule.plan, binding, stats));
  return FinishAccumulator(ctx, accumulator, args.out);
}

absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape,
                                      const ContextAttentionBackwardArgs& args, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const AttentionGeometry::Mask* mask, geometry.MaskFor(ctx, shape.window));
  const AttentionGeometry::Schedule& schedule = mask->backward;
  ArenaScope scope(ctx.scratch);
  const TensorRef delta = ctx.scratch.Allocate(args.lse.dtype(), args.lse.shape());
  ANNULUS_RETURN_IF_ERROR(AttentionDelta(ctx, HeadsOf(args.out, 0, shape.heads, shape.v_head_dim),
                                         HeadsOf(args.dout, 0, shape.heads, shape.v_head_dim), delta));
  if (schedule.whole) {
    const AttendCall& call = schedule.calls[0][0];
    // Keys that no query sees get no gradient from the call.
    if (call.keys.size() < args.kv.dim(0)) ANNULUS_RETURN_IF_ERROR(Zero(ctx, args.dkv));
    return AttentionBackwardWhole(ctx, BlockOf(call, *mask, shape, args.q, SplitKv(args.kv, shape)),
                                  GradientsOf(call, shape, args, delta, args.dq, SplitKv(args.dkv, shape)));
  }
  const TensorRef dq = AccumulatorFor(ctx, args.dq), dkv = AccumulatorFor(ctx, args.dkv);
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, dq));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, dkv));
  ANNULUS_ASSIGN_OR_RETURN(ExchangeTransport * transport, geometry.Transport(ctx));
  ExchangeBinding binding;
  ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport->Slots(ctx, schedule.plan, args.kv, dkv));
  const Step* first = schedule.plan.ranks[static_cast<size_t>(geometry.cp().rank())].steps.data();
  binding.attend = [&](const Step& step) -> absl::Status {
    const TensorRef grad_slot = binding.slots[static_cast<size_t>(step.grad_slot)];
    const std::vector<AttendCall>& calls = schedule.calls[static_cast<size_t>(&step - first)];
    const bool overwrite = step.grad_write == GradWrite::kOverwrite;
    const bool one_call = calls.size() == 1 && calls[0].keys == step.rows;
    if (overwrite && !one_call) {
      ANNULUS_RETURN_IF_ERROR(Zero(ctx, grad_slot.Rows(step.rows.begin, step.rows.end)));
    }
    const KvHeads kv =
        SplitKv(binding.slots[static_cast<size_t>(step.slot)].Reshaped(args.kv.shape()), shape);
    const KvHeads grads = SplitKv(grad_slot.Reshaped(args.kv.shape()), shape);
    for (const AttendCall& call : calls) {
      AttentionGradients gradients = GradientsOf(call, shape, args, delta, dq, grads);
      if (overwrite && one_call) gradients.kv_write = Write::kOverwrite;
      ANNULUS_RETURN_IF_ERROR(AttentionBackward(ctx, BlockOf(call, *mask, shape, args.q, kv), gradients));
    }
    return absl::OkStatus();
  };
  binding.reduce = [&](ConstTensorRef from, TensorRef to) { return AddInPlace(ctx, from, to); };
  ANNULUS_RETURN_IF_ERROR(transport->Execute(ctx, schedule.plan, binding, stats));
  ANNULUS_RETURN_IF_ERROR(FinishAccumulator(ctx, dq, args.dq));
  return FinishAccumulator(ctx, dkv, args.dkv);
}

}  // namespace annulus
