#include "annulus/parallel/context_attention.h"

#include <algorithm>
#include <limits>

#include "annulus/ops/elementwise.h"
#include "plan_compute.h"
#include "slot_fields.h"

namespace annulus {
namespace {

using Schedule = AttentionGeometry::Schedule;

// Memory for a result while the plan runs: the caller's, or accumulators in its place.
TensorRef HomeMemory(Context& ctx, const Schedule& schedule, Payload payload, TensorRef result) {
  const DType accum = AccumOf(result.dtype());
  const bool own = schedule.results[static_cast<size_t>(payload)].width == Width::kCompute;
  return own || accum == result.dtype() ? result : ctx.scratch.Allocate(accum, result.shape());
}
bool EmptyBefore(const Schedule& schedule, Payload payload) {
  return schedule.results[static_cast<size_t>(payload)].empty_before;
}
absl::Status Finish(Context& ctx, TensorRef home, TensorRef result) {
  return home.raw() == result.raw() ? absl::OkStatus() : Cast(ctx, home, result);
}

absl::Status Exchange(Context& ctx, AttentionGeometry& geometry, const Schedule& schedule, double scale,
                      const LatentWeights& latent, const std::function<SlotMemory(Payload)>& home,
                      ExchangeStats* stats) {
  const AttentionCase& layer = schedule.layer;
  ANNULUS_ASSIGN_OR_RETURN(ExchangeTransport * transport, geometry.Transport(ctx, schedule.choice.transport));
  const SlotSource source{.home = home, .fields = [&](const SlotSpec& slot) {
                            return FieldsOf(layer, schedule.plan.pass, GroupOf(layer, schedule.plan, slot),
                                            slot);
                          }};
  ExchangeBinding binding;
  ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport->Slots(ctx, schedule.plan, source));
  constexpr double kMostMs = std::numeric_limits<int32_t>::max();
  const auto patience_ms =
      static_cast<int64_t>(std::clamp(geometry.options().patience_seconds * 1e3, 1.0, kMostMs));
  PlanCompute compute(ctx, schedule, scale, geometry.cp().rank(), binding.slots, latent,
                      {.transport = transport, .patience_ms = patience_ms});
  binding.compute = [&](const Step& step) { return compute.Run(step); };
  if (!schedule.arriving.empty()) binding.takes_arrivals.resize(schedule.calls.size());
  for (const auto& [s, arriving] : schedule.arriving) binding.takes_arrivals[s] = true;
  return transport->Execute(ctx, schedule.plan, binding, stats);
}

// ---- Latents ------------------------------------------------------------------------------------

// Latents that are not exchanged, or exchanged with nobody, are expanded before.
absl::StatusOr<bool> ExpandsAtHome(Context& ctx, AttentionGeometry& geometry,
                                   const ContextAttentionShape& shape, DType dtype, Pass pass) {
  if (!shape.latent.has_value()) return false;
  ANNULUS_ASSIGN_OR_RETURN(const LatentDecision* decision, geometry.DecisionFor(ctx, shape, dtype, pass));
  if (!decision->latents) return true;
  ANNULUS_ASSIGN_OR_RETURN(const Schedule* schedule, geometry.ScheduleFor(ctx, shape, dtype, pass));
  return schedule->alone;
}

TensorRef AllocateKv(Context& ctx, const ContextAttentionShape& shape, const TensorRef& q) {
  return ctx.scratch.Allocate(q.dtype(),
                              {q.dim(0), q.dim(1), shape.heads * (shape.head_dim + shape.v_head_dim)});
}

absl::Status ForwardExpanded(Context& ctx, AttentionGeometry& geometry, const ContextAttentionShape& shape,
                             const ContextAttentionForwardArgs& args, ExchangeStats* stats) {
  ArenaScope scope(ctx.scratch);
  const TensorRef kv = AllocateKv(ctx, shape, args.q);
  ANNULUS_RETURN_IF_ERROR(ExpandLatents(ctx, *shape.latent, args.latent, args.kv, kv));
  ContextAttentionForwardArgs expanded = args;
  expanded.kv = kv;
  return ContextAttentionForward(ctx, geometry, Expanded(shape), expanded, stats);
}

absl::Status BackwardExpanded(Context& ctx, AttentionGeometry& geometry, const ContextAttentionShape& shape,
                              const ContextAttentionBackwardArgs& args, ExchangeStats* stats) {
  ArenaScope scope(ctx.scratch);
  ContextAttentionBackwardArgs expanded = args;
  expanded.kv = AllocateKv(ctx, shape, args.q), expanded.dkv = AllocateKv(ctx, shape, args.q);
  ANNULUS_RETURN_IF_ERROR(ExpandLatents(ctx, *shape.latent, args.latent, args.kv, expanded.kv));
  ANNULUS_RETURN_IF_ERROR(ContextAttentionBackward(ctx, geometry, Expanded(shape), expanded, stats));
  return ExpandLatentsBackward(ctx, *shape.latent, args.latent, args.kv, expanded.dkv, Write::kOverwrite,
                               args.dkv);
}

}  // namespace

absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape,
                                     const ContextAttentionForwardArgs& args, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const bool at_home,
                           ExpandsAtHome(ctx, geometry, shape, args.q.dtype(), Pass::kForward));
  if (at_home) return ForwardExpanded(ctx, geometry, shape, args, stats);
  ANNULUS_ASSIGN_OR_RETURN(const Schedule* schedule,
                           geometry.ScheduleFor(ctx, shape, args.q.dtype(), Pass::kForward));
  const AttentionCase& layer = schedule->layer;
  const auto heads_of = [&](const TensorRef& out) { return HeadsOf(out, 0, shape.heads, shape.v_head_dim); };
  ArenaScope scope(ctx.scratch);
  if (schedule->whole) {
    const AttentionBlock block = BlockOf(schedule->calls[0][0], schedule->bounds, layer, shape.scale,
                                         AllHeadsOf(layer), args.q, {.kv = args.kv, .heads = layer.kv_heads});
    return AttentionForwardWhole(ctx, block, heads_of(args.out), args.lse);
  }
  const TensorRef out = HomeMemory(ctx, *schedule, Payload::kOutput, args.out);
  const TensorRef sum =
      CarriesSums(layer) ? ctx.scratch.Allocate(args.lse.dtype(), args.lse.shape()) : TensorRef();
  if (EmptyBefore(*schedule, Payload::kOutput)) {
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, out));
    // A partial result without columns: resets its LSE alone.
    const HeadsRef none = HeadsOf(args.lse, 0, shape.heads, 0);
    ANNULUS_RETURN_IF_ERROR(ResetPartial(ctx, {.out = none, .lse = args.lse, .sum = sum}));
  }
  const auto home = [&](Payload payload) -> SlotMemory {
    if (payload == Payload::kQuery) return {{args.q}};
    if (payload == Payload::kKv) return {{args.kv}};
    SlotMemory output{{out, args.lse}};
    if (CarriesSums(layer)) output.fields.push_back(sum);
    return output;
  };
  ANNULUS_RETURN_IF_ERROR(Exchange(ctx, geometry, *schedule, shape.scale, args.latent, home, stats));
  if (CarriesSums(layer)) {
    ANNULUS_RETURN_IF_ERROR(FinishPartial(ctx, {.out = heads_of(out), .lse = args.lse, .sum = sum}));
  }
  return Finish(ctx, out, args.out);
}

absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape,
                                      const ContextAttentionBackwardArgs& args, ExchangeStats* stats) {
  ANNULUS_ASSIGN_OR_RETURN(const bool at_home,
                           ExpandsAtHome(ctx, geometry, shape, args.q.dtype(), Pass::kBackward));
  if (at_home) return BackwardExpanded(ctx, geometry, shape, args, stats);
  ANNULUS_ASSIGN_OR_RETURN(const Schedule* schedule,
                           geometry.ScheduleFor(ctx, shape, args.q.dtype(), Pass::kBackward));
  const AttentionCase& layer = schedule->layer;
  const auto heads_of = [&](const TensorRef& out) { return HeadsOf(out, 0, shape.heads, shape.v_head_dim); };
  ArenaScope scope(ctx.scratch);
  const TensorRef delta = ctx.scratch.Allocate(args.lse.dtype(), args.lse.shape());
  ANNULUS_RETURN_IF_ERROR(AttentionDelta(ctx, heads_of(args.out), heads_of(args.dout), delta));
  if (schedule->whole) {
    const AttendCall& call = schedule->calls[0][0];
    // Keys that no query sees get no gradient from the call.
    if (call.keys.size() < args.kv.dim(0)) ANNULUS_RETURN_IF_ERROR(Zero(ctx, args.dkv));
    const HeadGroup all = AllHeadsOf(layer);
    const KvHeads dkv = SplitKv(layer, {.kv = args.dkv, .heads = layer.kv_heads}, call.keys);
    return AttentionBackwardWhole(ctx,
                                  BlockOf(call, schedule->bounds, layer, shape.scale, all, args.q,
                                          {.kv = args.kv, .heads = layer.kv_heads}),
                                  {.out = heads_of(args.out),
                                   .dout = heads_of(args.dout),
                                   .lse = args.lse,
                                   .delta = delta,
                                   .dq = HeadsOf(args.dq, 0, shape.heads, shape.head_dim),
                                   .dk = dkv.k,
                                   .dv = dkv.v});
  }
  const TensorRef dq = HomeMemory(ctx, *schedule, Payload::kQueryGrad, args.dq),
                  dkv = HomeMemory(ctx, *schedule, Payload::kKvGrad, args.dkv);
  if (EmptyBefore(*schedule, Payload::kQueryGrad)) ANNULUS_RETURN_IF_ERROR(Zero(ctx, dq));
  if (EmptyBefore(*schedule, Payload::kKvGrad)) ANNULUS_RETURN_IF_ERROR(Zero(ctx, dkv));
  const auto home = [&](Payload payload) -> SlotMemory {
    if (payload == Payload::kKv) return {{args.kv}};
    if (payload == Payload::kQueryGrad) return {{dq}};
    if (payload == Payload::kKvGrad) return {{dkv}};
    SlotMemory query{{args.q, args.dout, args.lse, delta}};
    if (BackwardReadsOutput(layer)) query.fields.push_back(args.out);
    return query;
  };
  ANNULUS_RETURN_IF_ERROR(Exchange(ctx, geometry, *schedule, shape.scale, args.latent, home, stats));
  ANNULUS_RETURN_IF_ERROR(Finish(ctx, dq, args.dq));
  return Finish(ctx, dkv, args.dkv);
}

}  // namespace annulus
