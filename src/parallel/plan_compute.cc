#include "plan_compute.h"

#include <algorithm>

#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"
#include "slot_fields.h"

namespace annulus {
namespace {

// Whether the one call takes just these rows.
bool IsAll(const std::vector<RowRange>& rows, const RowRange& of_call) {
  return rows == std::vector<RowRange>{of_call};
}

// Rows of the KV slot that the calls read: ascending and apart.
std::vector<RowRange> KeyRows(const std::vector<AttendCall>& calls) {
  std::vector<RowRange> all;
  for (const AttendCall& call : calls) all.push_back(call.keys);
  std::sort(all.begin(), all.end(), [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
  std::vector<RowRange> apart;
  for (const RowRange& rows : all) {
    if (apart.empty() || rows.begin > apart.back().end) {
      apart.push_back(rows);
    } else {
      apart.back().end = std::max(apart.back().end, rows.end);
    }
  }
  return apart;
}

}  // namespace

Accumulator::Accumulator(Context& ctx, TensorRef result, std::vector<RowRange> rows)
    : ctx_(ctx), result_(result), rows_(std::move(rows)), memory_(result) {
  const DType accum = AccumOf(result.dtype());
  if (accum == result.dtype() || rows_.empty()) return;
  offset_ = rows_.front().begin;
  memory_ = ctx.scratch.Allocate(accum, {rows_.back().end - offset_, result.dim(1), result.dim(2)});
}

TensorRef Accumulator::Rows(const RowRange& rows) const {
  return memory_.Rows(rows.begin - offset_, rows.end - offset_);
}

absl::Status Accumulator::Zero() {
  for (const RowRange& rows : rows_) ANNULUS_RETURN_IF_ERROR(annulus::Zero(ctx_, Rows(rows)));
  return absl::OkStatus();
}

absl::Status Accumulator::Finish() {
  if (memory_.raw() == result_.raw()) return absl::OkStatus();
  for (const RowRange& rows : rows_) {
    ANNULUS_RETURN_IF_ERROR(Cast(ctx_, Rows(rows), result_.Rows(rows.begin, rows.end)));
  }
  return absl::OkStatus();
}

KvHeads SplitKv(const AttentionCase& layer, const KvRows& kv, const RowRange& rows) {
  const int64_t begin = rows.begin - kv.first, end = rows.end - kv.first;
  return {HeadsOf(kv.kv, 0, kv.heads, layer.head_dim).Rows(begin, end),
          HeadsOf(kv.kv, kv.heads * layer.head_dim, kv.heads, layer.v_head_dim).Rows(begin, end)};
}

AttentionBlock BlockOf(const AttendCall& call, const DeviceBounds& bounds, const AttentionCase& layer,
                       double scale, const HeadGroup& group, TensorRef q, const KvRows& kv) {
  const KvHeads keys = SplitKv(layer, kv, call.keys);
  return {.q = HeadsOf(q, 0, group.q_heads(), layer.head_dim).Rows(call.q_rows.begin, call.q_rows.end),
          .k = keys.k,
          .v = keys.v,
          .bounds = bounds.Of(call),
          .mask_shape = call.shape,
          .key_positions = call.key_positions,
          .scale = scale};
}

PlanCompute::PlanCompute(Context& ctx, const AttentionGeometry::Schedule& schedule, double scale, int cp_rank,
                         const std::vector<SlotMemory>& slots, const LatentWeights& latent,
                         const KeyWaits& waits)
    : ctx_(ctx),
      schedule_(schedule),
      layer_(schedule.layer),
      scale_(scale),
      plan_(schedule.plan),
      rank_(schedule.plan.ranks[static_cast<size_t>(cp_rank)]),
      slots_(slots),
      latent_(latent),
      waits_(waits) {}

absl::Status PlanCompute::Run(const Step& step) {
  ArenaScope scope(ctx_.scratch);
  switch (step.kind) {
    case StepKind::kAttend: {
      const auto index = static_cast<size_t>(&step - rank_.steps.data());
      const auto arriving = schedule_.arriving.find(index);
      if (arriving != schedule_.arriving.end()) return ForwardArriving(step, arriving->second);
      const auto& calls = schedule_.calls[index];
      if (plan_.pass == Pass::kForward) return Forward(step.attend, calls);
      return layer_.latent.has_value() ? LatentBackward(step.attend, calls) : Backward(step.attend, calls);
    }
    case StepKind::kCopy:
      return Move(step, Write::kOverwrite);
    case StepKind::kReduce:
      return SpecOf(step.slot).payload == Payload::kOutput ? Merge(step) : Move(step, Write::kAccumulate);
    case StepKind::kSend:
    case StepKind::kReceive:
      break;
  }
  ANNULUS_CHECK(false) << plan_.name << ": a transfer to compute";
  return absl::OkStatus();
}

TensorRef PlanCompute::Field(int slot, int field) const {
  return slots_[static_cast<size_t>(slot)].fields[static_cast<size_t>(field)];
}

// Nothing where they are not carried.
TensorRef PlanCompute::SumsOf(int output_slot) const {
  return CarriesSums(layer_) ? Field(output_slot, output_field::kSum) : TensorRef();
}

HeadGroup PlanCompute::GroupOf(int slot) const { return annulus::GroupOf(layer_, plan_, SpecOf(slot)); }

RowRange PlanCompute::RowsOf(int slot, const Step& step) const {
  const int64_t begin = RowInSlot(plan_, SpecOf(slot), step.rows);
  return {begin, begin + step.rows.rows.size()};
}

LatentWeights PlanCompute::WeightsOf(const HeadGroup& group) const {
  return latent_.Heads(*layer_.latent, group.q_begin, group.q_end);
}

absl::StatusOr<KvRows> PlanCompute::KeysOf(const Attend& attend, const std::vector<AttendCall>& calls) {
  const HeadGroup group = GroupOf(attend.q_slot);
  const TensorRef slot = Field(attend.kv_slot, 0);
  if (!layer_.latent.has_value()) {
    return KvRows{.kv = slot, .heads = static_cast<int64_t>(group.kv_heads.size())};
  }
  const std::vector<RowRange> rows = KeyRows(calls);
  const int64_t first = rows.empty() ? 0 : rows.front().begin, end = rows.empty() ? 0 : rows.back().end;
  const int64_t columns = group.q_heads() * (layer_.head_dim + layer_.v_head_dim);
  const TensorRef kv = ctx_.scratch.Allocate(slot.dtype(), {end - first, slot.dim(1), columns});
  for (const RowRange& range : rows) {
    ANNULUS_RETURN_IF_ERROR(ExpandLatents(ctx_, *layer_.latent, WeightsOf(group),
                                          slot.Rows(range.begin, range.end),
                                          kv.Rows(range.begin - first, range.end - first)));
  }
  return KvRows{.kv = kv, .heads = group.q_heads(), .first = first};
}

absl::Status PlanCompute::Forward(const Attend& attend, const std::vector<AttendCall>& calls) {
  const HeadGroup group = GroupOf(attend.q_slot);
  const TensorRef q = Field(attend.q_slot, query_field::kQ);
  ANNULUS_ASSIGN_OR_RETURN(const KvRows kv, KeysOf(attend, calls));
  const TensorRef result = Field(attend.q_result, output_field::kOut),
                  lse = Field(attend.q_result, output_field::kLse), sum = SumsOf(attend.q_result);
  const std::vector<RowRange> rows = RowsInSlot(plan_, SpecOf(attend.q_result), attend.q_rows);
  const auto heads_of = [&](const TensorRef& out) {
    return HeadsOf(out, 0, group.q_heads(), layer_.v_head_dim);
  };
  const bool overwrite = attend.q_write == ResultWrite::kOverwrite;
  if (overwrite && calls.size() == 1 && IsAll(rows, calls[0].q_rows) && result.dtype() == q.dtype() &&
      !CarriesSums(layer_)) {
    const AttentionBlock block = BlockOf(calls[0], schedule_.bounds, layer_, scale_, group, q, kv);
    const RowRange& all = calls[0].q_rows;
    return AttentionForwardWhole(ctx_, block, heads_of(result.Rows(all.begin, all.end)),
                                 lse.Rows(all.begin, all.end));
  }
  ANNULUS_CHECK(overwrite || result.dtype() == lse.dtype()) << plan_.name << ": adds to a rounded output";
  Accumulator out(ctx_, result, rows);
  const auto partial = [&](const RowRange& part) {
    AttentionPartial of_part{.out = heads_of(out.Rows(part)), .lse = lse.Rows(part.begin, part.end)};
    if (CarriesSums(layer_)) of_part.sum = sum.Rows(part.begin, part.end);
    return of_part;
  };
  for (const RowRange& part : rows) {
    if (overwrite) ANNULUS_RETURN_IF_ERROR(ResetPartial(ctx_, partial(part)));
  }
  for (const AttendCall& call : calls) {
    const AttentionBlock block = BlockOf(call, schedule_.bounds, layer_, scale_, group, q, kv);
    ANNULUS_RETURN_IF_ERROR(AttentionForward(ctx_, block, partial(call.q_rows)));
  }
  return out.Finish();
}

// In the parts that messages bring the transport tells the kernel when it has.
absl::Status PlanCompute::ForwardArriving(const Step& step, ArrivingCall arriving) {
  const Attend& attend = step.attend;
  const HeadGroup group = GroupOf(attend.q_slot);
  const KvRows kv{.kv = Field(attend.kv_slot, 0), .heads = static_cast<int64_t>(group.kv_heads.size())};
  const Arrivals arrivals = waits_.transport->ArrivalsOf(step);
  ANNULUS_CHECK(arrivals.flags.size() <= arriving.parts.size()) << plan_.name;
  for (size_t i = 0; i < arrivals.flags.size(); ++i) {
    arriving.parts[i].arrived = arrivals.flags[i].flag;
    arriving.parts[i].awaited = arrivals.flags[i].awaited;
  }
  const ArrivingAttention attention{.block = BlockOf(arriving.call, schedule_.bounds, layer_, scale_, group,
                                                     Field(attend.q_slot, query_field::kQ), kv),
                                    .parts = arriving.parts,
                                    .patience_ms = waits_.patience_ms,
                                    .report = arrivals.report};
  return AttentionForwardArriving(
      ctx_, attention,
      HeadsOf(Field(attend.q_result, output_field::kOut), 0, group.q_heads(), layer_.v_head_dim),
      Field(attend.q_result, output_field::kLse));
}

// Without gradients to write.
AttentionGradients PlanCompute::GradientsOf(const Attend& attend, const AttendCall& call) const {
  const HeadGroup group = GroupOf(attend.q_slot);
  const auto field = [&](int index) {
    return Field(attend.q_slot, index).Rows(call.q_rows.begin, call.q_rows.end);
  };
  AttentionGradients gradients{
      .out = {},
      .dout = HeadsOf(field(query_field::kDout), 0, group.q_heads(), layer_.v_head_dim),
      .lse = field(query_field::kLse),
      .delta = field(query_field::kDelta),
      .dq = {},
      .dk = {},
      .dv = {}};
  if (BackwardReadsOutput(layer_)) {
    gradients.out = HeadsOf(field(query_field::kOut), 0, group.q_heads(), layer_.v_head_dim);
  }
  return gradients;
}

absl::Status PlanCompute::Backward(const Attend& attend, const std::vector<AttendCall>& calls) {
  const HeadGroup group = GroupOf(attend.q_slot);
  const TensorRef q = Field(attend.q_slot, query_field::kQ), kv = Field(attend.kv_slot, 0);
  const auto kv_heads = static_cast<int64_t>(group.kv_heads.size());
  const TensorRef q_result = Field(attend.q_result, 0), kv_result = Field(attend.kv_result, 0);
  const std::vector<RowRange> q_rows = RowsInSlot(plan_, SpecOf(attend.q_result), attend.q_rows),
                              kv_rows = RowsInSlot(plan_, SpecOf(attend.kv_result), attend.kv_rows);
  const bool q_overwrite = attend.q_write == ResultWrite::kOverwrite,
             kv_overwrite = attend.kv_write == ResultWrite::kOverwrite;
  ANNULUS_CHECK((q_overwrite || q_result.dtype() == AccumOf(q.dtype())) &&
                (kv_overwrite || kv_result.dtype() == AccumOf(kv.dtype())))
      << plan_.name << ": adds to a rounded gradient";
  const auto run = [&](const AttendCall& call, AttentionGradients gradients, const TensorRef& dq,
                       const TensorRef& dkv, const RowRange& dkv_rows, auto* op) {
    gradients.dq = HeadsOf(dq, 0, group.q_heads(), layer_.head_dim);
    const KvHeads dkv_heads = SplitKv(layer_, {.kv = dkv, .heads = kv_heads}, dkv_rows);
    gradients.dk = dkv_heads.k, gradients.dv = dkv_heads.v;
    const KvRows keys{.kv = kv, .heads = kv_heads};
    return op(ctx_, BlockOf(call, schedule_.bounds, layer_, scale_, group, q, keys), gradients);
  };
  const bool kv_at_once = kv_overwrite && calls.size() == 1 && IsAll(kv_rows, calls[0].keys);
  if (q_overwrite && kv_at_once && IsAll(q_rows, calls[0].q_rows) && q_result.dtype() == q.dtype() &&
      kv_result.dtype() == kv.dtype()) {
    const RowRange& all = calls[0].q_rows;
    return run(calls[0], GradientsOf(attend, calls[0]), q_result.Rows(all.begin, all.end), kv_result,
               calls[0].keys, AttentionBackwardWhole);
  }
  Accumulator dq(ctx_, q_result, q_rows), dkv(ctx_, kv_result, kv_rows);
  if (q_overwrite) ANNULUS_RETURN_IF_ERROR(dq.Zero());
  if (kv_overwrite && !kv_at_once) ANNULUS_RETURN_IF_ERROR(dkv.Zero());
  for (const AttendCall& call : calls) {
    AttentionGradients gradients = GradientsOf(attend, call);
    if (kv_at_once) gradients.kv_write = Write::kOverwrite;
    ANNULUS_RETURN_IF_ERROR(run(call, gradients, dq.Rows(call.q_rows), dkv.Rows(call.keys),
                                {0, call.keys.size()}, AttentionBackward));
  }
  ANNULUS_RETURN_IF_ERROR(dq.Finish());
  return dkv.Finish();
}

// Keys and values have gradients in scratch memory for the time of the step: they go back through the
// expansion.
absl::Status PlanCompute::LatentBackward(const Attend& attend, const std::vector<AttendCall>& calls) {
  const HeadGroup group = GroupOf(attend.q_slot);
  const TensorRef q = Field(attend.q_slot, query_field::kQ), latents = Field(attend.kv_slot, 0);
  const TensorRef dlatents = Field(attend.kv_result, 0);
  const std::vector<RowRange> key_rows = KeyRows(calls);
  if (attend.kv_write == ResultWrite::kOverwrite) {
    for (const RowRange& rows : RowsInSlot(plan_, SpecOf(attend.kv_result), attend.kv_rows))
      ANNULUS_RETURN_IF_ERROR(Zero(ctx_, dlatents.Rows(rows.begin, rows.end)));
  }
  Accumulator dq(ctx_, Field(attend.q_result, 0), RowsInSlot(plan_, SpecOf(attend.q_result), attend.q_rows));
  if (attend.q_write == ResultWrite::kOverwrite) ANNULUS_RETURN_IF_ERROR(dq.Zero());
  ANNULUS_ASSIGN_OR_RETURN(const KvRows kv, KeysOf(attend, calls));
  const KvRows dkv{.kv = ctx_.scratch.Allocate(AccumOf(kv.kv.dtype()), kv.kv.shape()),
                   .heads = kv.heads,
                   .first = kv.first};
  const bool at_once = calls.size() == 1;
  if (!at_once) ANNULUS_RETURN_IF_ERROR(Zero(ctx_, dkv.kv));
  for (const AttendCall& call : calls) {
    AttentionGradients gradients = GradientsOf(attend, call);
    if (at_once) gradients.kv_write = Write::kOverwrite;
    gradients.dq = HeadsOf(dq.Rows(call.q_rows), 0, group.q_heads(), layer_.head_dim);
    const KvHeads of_call = SplitKv(layer_, dkv, call.keys);
    gradients.dk = of_call.k, gradients.dv = of_call.v;
    ANNULUS_RETURN_IF_ERROR(
        AttentionBackward(ctx_, BlockOf(call, schedule_.bounds, layer_, scale_, group, q, kv), gradients));
  }
  for (const RowRange& rows : key_rows) {
    ANNULUS_RETURN_IF_ERROR(ExpandLatentsBackward(ctx_, *layer_.latent, WeightsOf(group),
                                                  latents.Rows(rows.begin, rows.end),
                                                  dkv.kv.Rows(rows.begin - dkv.first, rows.end - dkv.first),
                                                  Write::kAccumulate, dlatents.Rows(rows.begin, rows.end)));
  }
  return dq.Finish();
}

absl::Status PlanCompute::Move(const Step& step, Write write) {
  const RowRange from = RowsOf(step.slot, step), into = RowsOf(step.into, step);
  const auto runs =
      RunsBetween(layer_, plan_.pass, SpecOf(step.slot).payload, GroupOf(step.slot), GroupOf(step.into));
  for (size_t f = 0; f < runs.size(); ++f) {
    const int field = static_cast<int>(f);
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx_, Field(step.slot, field).Rows(from.begin, from.end), runs[f],
                                        write, Field(step.into, field).Rows(into.begin, into.end)));
  }
  return absl::OkStatus();
}

absl::Status PlanCompute::Merge(const Step& step) {
  const HeadGroup there = GroupOf(step.slot), here = GroupOf(step.into);
  const int64_t begin = std::max(there.q_begin, here.q_begin),
                heads = std::min(there.q_end, here.q_end) - begin;
  if (heads <= 0) return absl::OkStatus();
  const auto heads_of = [&](int slot, const HeadGroup& group, int field, int64_t dim) {
    const RowRange rows = RowsOf(slot, step);
    return HeadsOf(Field(slot, field), (begin - group.q_begin) * dim, heads, dim).Rows(rows.begin, rows.end);
  };
  PartialMerge merge{.out = heads_of(step.slot, there, output_field::kOut, layer_.v_head_dim),
                     .lse = heads_of(step.slot, there, output_field::kLse, 1),
                     .into_out = heads_of(step.into, here, output_field::kOut, layer_.v_head_dim),
                     .into_lse = heads_of(step.into, here, output_field::kLse, 1)};
  if (CarriesSums(layer_)) {
    merge.sum = heads_of(step.slot, there, output_field::kSum, 1);
    merge.into_sum = heads_of(step.into, here, output_field::kSum, 1);
  }
  return MergePartials(ctx_, merge);
}

}  // namespace annulus
