#include "arriving_keys.h"

#include <algorithm>

#include "annulus/base/check.h"

namespace annulus {

bool TakesArrivals(const AttentionKernelCase& kernel, const AttentionCase& layer, const ExchangePlan& plan,
                   TransportKind transport, LinkThrottle throttle) {
  if (transport != TransportKind::kCopyEngine || throttle.bytes_per_second > 0) return false;
  if (layer.latent.has_value() || !TakesArrivals(kernel)) return false;
  bool any = false;
  for (const RankPlan& rank : plan.ranks) {
    for (const Step& step : rank.steps) {
      if (step.kind != StepKind::kAttend || step.attend.arrival != KeyArrival::kDuring) continue;
      any = true;
      if (step.attend.kv_rows.size() > kMaxKeyParts) return false;
    }
  }
  return any;
}

ArrivingCall ArrivingCallOf(const SequenceLayout& layout, const ExchangePlan& plan, int cp_rank,
                            const Step& step) {
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  const Attend& attend = step.attend;
  const SlotSpec &queries = rank.slots[static_cast<size_t>(attend.q_slot)],
                 &keys = rank.slots[static_cast<size_t>(attend.kv_slot)];
  ANNULUS_CHECK(queries.home) << plan.name << ": keys come to queries that travel";
  const int64_t stride = layout.chunks(0).front().stride;
  ArrivingCall arriving{.call = {.queries = SlotBlockOf(plan, queries.span, cp_rank),
                                 .q_rows = {0, SlotRows(plan, queries)},
                                 .keys = {0, SlotRows(plan, keys)},
                                 .shape = MaskShape::kGeneral,
                                 .bounds = BoundsSource::kMask,
                                 .key_positions = {}},
                        .parts = {}};
  const auto add = [&](const BlockRows& rows) {
    const Chunk& chunk = plan.problem.chunks[static_cast<size_t>(ChunkOf(plan.problem, rows))];
    const int64_t begin = RowInSlot(plan, keys, rows);
    const int64_t position = chunk.position + stride * (rows.rows.begin - chunk.rows.begin);
    arriving.parts.push_back(
        {.rows = {begin, begin + rows.rows.size()}, .positions = {.offset = position, .stride = stride}});
  };
  std::vector<BlockRows> received;
  for (const int before : step.after) {
    if (!ArrivesDuring(rank, step, before)) continue;
    received.push_back(rank.steps[static_cast<size_t>(before)].rows);
    add(received.back());
  }
  for (const BlockRows& rows : attend.kv_rows) {
    if (std::find(received.begin(), received.end(), rows) == received.end()) add(rows);
  }
  return arriving;
}

}  // namespace annulus
