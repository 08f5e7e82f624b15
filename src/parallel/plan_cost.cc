#include "plan_cost.h"

#include <algorithm>
#include <map>
#include <memory>

#include "annulus/base/check.h"
#include "slot_fields.h"

namespace annulus {
namespace {

// Time of a message: overhead + bytes / per_second.
struct Line {
  double overhead = 0, per_second = 0;
};

// Through the two points around `bytes` (the nearest two outside of them), in time: what is measured comes
// out, and messages that are smaller than any measured still take the overhead.
Line LineAt(const std::vector<RatePoint>& points, double bytes) {
  if (points.size() > 1) {
    size_t i = 1;
    while (i + 1 < points.size() && points[i].size < bytes) ++i;
    const RatePoint &low = points[i - 1], &high = points[i];
    const double low_time = low.size / low.per_second, high_time = high.size / high.per_second;
    if (high_time > low_time) {
      const double per_second = (high.size - low.size) / (high_time - low_time);
      const double overhead = low_time - low.size / per_second;
      if (overhead >= 0) return {overhead, per_second};
    }
  }
  return {0, RateAt(points, bytes)};
}

// A size to go by: the mean over bytes.
double MessageBytesOf(const ExchangePlan& plan, const ExchangeCost& cost) {
  double sum = 0, squares = 0;
  for (const RankPlan& rank : plan.ranks) {
    for (const Step& step : rank.steps) {
      if (step.kind != StepKind::kSend) continue;
      const double bytes = static_cast<double>(step.rows.rows.size()) *
                           cost.row_bytes(rank.slots[static_cast<size_t>(step.slot)]);
      sum += bytes;
      squares += bytes * bytes;
    }
  }
  return sum > 0 ? squares / sum : 0;
}

void SetRates(const LinkRate& link, LinkThrottle throttle, double message_bytes, ExchangeCost* cost) {
  const Line one = LineAt(link.one_way, message_bytes);
  // Of both together, in time of the pair.
  std::vector<RatePoint> pairs = link.both_ways;
  for (RatePoint& point : pairs) point.size *= 2;
  const Line both = LineAt(pairs, 2 * message_bytes);
  cost->egress_bytes_per_second = cost->ingress_bytes_per_second = std::max(one.per_second, both.per_second);
  double rate = one.per_second;
  cost->message_overhead_seconds = one.overhead;
  if (throttle.bytes_per_second > 0) {
    // The throttle holds the link for bytes / rate, whatever else happens meanwhile.
    const double took = one.overhead + message_bytes / one.per_second;
    rate = std::min(rate, throttle.bytes_per_second);
    cost->message_overhead_seconds = std::clamp(took - message_bytes / rate, 0.0, one.overhead);
  }
  cost->link_bytes_per_second = [rate](int, int) { return rate; };
  // From one message to the next takes the overhead already.
  cost->message_seconds = std::max(0.0, link.message_seconds - one.overhead);
  cost->computing_slowdown = link.computing_slowdown;
  if (link.transport == TransportKind::kNccl) cost->order = MessageOrder::kRounds;
}

}  // namespace

RowBytes::RowBytes(const AttentionCase& layer, const ExchangePlan& plan) {
  for (const RankPlan& rank : plan.ranks) {
    for (const SlotSpec& slot : rank.slots) {
      const auto [known, first] = bytes_.try_emplace(KeyOf(slot), 0);
      if (!first) continue;
      for (const SlotField& field : FieldsOf(layer, plan.pass, GroupOf(layer, plan, slot), slot))
        known->second += field.row.elements() * SizeOf(field.dtype);
    }
  }
}

int64_t RowBytes::Of(const SlotSpec& slot) const {
  const auto known = bytes_.find(KeyOf(slot));
  ANNULUS_CHECK(known != bytes_.end()) << "a slot of another plan";
  return known->second;
}

const LinkRate* FindLink(const MachineProfile& machine, TransportKind transport) {
  const auto found = std::find_if(machine.links.begin(), machine.links.end(),
                                  [&](const LinkRate& link) { return link.transport == transport; });
  return found == machine.links.end() ? nullptr : &*found;
}

ExchangeCost MessageCostOf(const AttentionCase& layer, const ExchangePlan& plan, const LinkRate* link,
                           LinkThrottle throttle) {
  ExchangeCost cost;
  const auto row_bytes = std::make_shared<RowBytes>(layer, plan);
  cost.row_bytes = [row_bytes](const SlotSpec& slot) { return static_cast<double>(row_bytes->Of(slot)); };
  if (link != nullptr) SetRates(*link, throttle, MessageBytesOf(plan, cost), &cost);
  return cost;
}

std::map<std::pair<int, int>, int64_t> BytesSentIn(const AttentionCase& layer, const ExchangePlan& plan) {
  const RowBytes row_bytes(layer, plan);
  std::map<std::pair<int, int>, int64_t> sent;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    for (const Step& step : plan.ranks[r].steps) {
      if (step.kind != StepKind::kSend) continue;
      const SlotSpec& slot = plan.ranks[r].slots[static_cast<size_t>(step.slot)];
      sent[{static_cast<int>(r), step.peer}] += step.rows.rows.size() * row_bytes.Of(slot);
    }
  }
  return sent;
}

ExchangeCost CostOf(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine,
                    TransportKind transport, LinkThrottle throttle) {
  const LinkRate* link = FindLink(machine, transport);
  ANNULUS_CHECK(link != nullptr || plan.ranks.size() == 1)
      << machine.device << ": no rates of messages by " << Name(transport);
  ExchangeCost cost = MessageCostOf(layer, plan, link, throttle);
  const auto seconds =
      std::make_shared<std::vector<std::vector<double>>>(ComputeSecondsOf(layer, plan, machine));
  cost.compute_seconds = [seconds](int r, size_t s) { return (*seconds)[static_cast<size_t>(r)][s]; };
  return cost;
}

}  // namespace annulus
