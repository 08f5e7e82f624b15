#include "plan_cost.h"

#include <algorithm>
#include <map>
#include <memory>

#include "annulus/base/check.h"
#include "arriving_keys.h"
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

// Rates of messages of a size on one kind of link.
struct LinkTimes {
  double per_second = 0, together_per_second = 0;  // to one peer; to two peers
  double overhead = 0, latency = 0;                // seconds
};

LinkTimes TimesOf(const LinkRate& link, double message_bytes) {
  const Line one = LineAt(link.one_way, message_bytes);
  // Of both together, in time of the pair.
  std::vector<RatePoint> pairs = link.both_ways;
  for (RatePoint& point : pairs) point.size *= 2;
  const Line both = LineAt(pairs, 2 * message_bytes);
  // From one message to the next takes the overhead already.
  return {.per_second = one.per_second,
          .together_per_second = std::max(one.per_second, both.per_second),
          .overhead = one.overhead,
          .latency = std::max(0.0, link.message_seconds - one.overhead)};
}

void Throttle(LinkThrottle throttle, double message_bytes, LinkTimes* times) {
  if (throttle.bytes_per_second == 0) return;
  // The throttle holds the link for bytes / rate, whatever else happens meanwhile.
  const double took = times->overhead + message_bytes / times->per_second;
  times->per_second = std::min(times->per_second, throttle.bytes_per_second);
  times->overhead = std::clamp(took - message_bytes / times->per_second, 0.0, times->overhead);
}

// `between`: of two hosts, null where all ranks are on one. Overhead and latency are then those of the slower
// link: plans between hosts wait for that.
void SetRates(const LinkRate& link, const LinkRate* between, const MachineProfile& machine,
              LinkThrottle throttle, double message_bytes, ExchangeCost* cost) {
  LinkTimes inside = TimesOf(link, message_bytes);
  cost->egress_bytes_per_second = cost->ingress_bytes_per_second = inside.together_per_second;
  Throttle(throttle, message_bytes, &inside);
  cost->message_overhead_seconds = inside.overhead;
  cost->message_seconds = inside.latency;
  cost->computing_slowdown = link.computing_slowdown;
  if (link.transport == TransportKind::kNccl) cost->order = MessageOrder::kRounds;
  const double rate = inside.per_second;
  if (between == nullptr) {
    cost->link_bytes_per_second = [rate](int, int) { return rate; };
    return;
  }
  LinkTimes outside = TimesOf(*between, message_bytes);
  Throttle(throttle, message_bytes, &outside);
  const double shared = machine.network.host_bytes_per_second;
  const double far = shared > 0 ? std::min(outside.per_second, shared) : outside.per_second;
  const int each = machine.network.ranks_per_host;
  cost->link_bytes_per_second = [=](int from, int to) { return from / each == to / each ? rate : far; };
  cost->message_overhead_seconds = std::max(inside.overhead, outside.overhead);
  cost->message_seconds = std::max(inside.latency, outside.latency);
  cost->computing_slowdown = std::max(link.computing_slowdown, between->computing_slowdown);
}

const LinkRate* FindIn(const std::vector<LinkRate>& links, TransportKind transport) {
  const auto found = std::find_if(links.begin(), links.end(),
                                  [&](const LinkRate& link) { return link.transport == transport; });
  return found == links.end() ? nullptr : &*found;
}

bool OnSeveralHosts(const MachineProfile& machine, int ranks) {
  return machine.network.ranks_per_host > 0 && ranks > machine.network.ranks_per_host;
}

// Between ranks of a host. Ranks that are alone on their hosts have none, and need none.
const LinkRate* FindInside(const MachineProfile& machine, TransportKind transport) {
  const LinkRate* link = FindIn(machine.links, transport);
  if (link != nullptr || machine.network.ranks_per_host != 1) return link;
  return FindIn(machine.network.links, transport);
}

// ---- Keys that come while a step computes -------------------------------------------------------

// Of an attend's pairs those whose keys the receive brings.
double ShareOf(const Attend& attend, const ExchangePlan& plan, const BlockRows& received) {
  double all = 0, here = 0;
  for (const BlockPair& pair : attend.pairs) {
    const auto pairs = static_cast<double>(pair.pairs);
    all += pairs;
    if (plan.problem.chunks[static_cast<size_t>(pair.kv_chunk)].owner != received.block) continue;
    const int64_t rows =
        std::min(pair.keys.end, received.rows.end) - std::max(pair.keys.begin, received.rows.begin);
    if (rows > 0) here += pairs * static_cast<double>(rows) / static_cast<double>(pair.keys.size());
  }
  return all > 0 ? here / all : 0;
}

// A tile that has to wait for keys rests in f32 and is read again; most that do rest once.
double RestSeconds(const AttentionCase& layer, const MachineProfile& machine) {
  const auto elements =
      static_cast<double>(layer.layout.local_rows() * layer.sequences.batch * layer.heads * layer.v_head_dim);
  const double bytes = 2 * elements * static_cast<double>(SizeOf(AccumOf(layer.dtype)));
  return bytes / RateAt(machine.copy, bytes);
}

// Of a computing step whose kernel takes keys as they come.
struct Taking {
  double rest = 0;                 // seconds more than with all keys there
  std::map<size_t, double> share;  // by receive
};
using TakingSteps = std::map<std::pair<int, size_t>, Taking>;  // by rank and step

TakingSteps FindTaking(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine) {
  TakingSteps taking;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const RankPlan& rank = plan.ranks[r];
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      for (const int before : rank.steps[s].after) {
        if (!ArrivesDuring(rank, rank.steps[s], before)) continue;
        const auto receive = static_cast<size_t>(before);
        Taking& step = taking[{static_cast<int>(r), s}];
        step.rest = RestSeconds(layer, machine);
        step.share[receive] = ShareOf(rank.steps[s].attend, plan, rank.steps[receive].rows);
      }
    }
  }
  return taking;
}

}  // namespace

void SetComputing(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine,
                  TransportKind transport, LinkThrottle throttle, std::shared_ptr<const StepSeconds> seconds,
                  ExchangeCost* cost) {
  AttentionKernelCase kernel = KernelCaseOf(layer, plan.pass, MaskShape::kGeneral);
  // Of the program that the machine's rates are from.
  kernel.hopper = RunsHopperKernels(machine);
  const auto of_step = [seconds = std::move(seconds)](int r, size_t s) {
    return (*seconds)[static_cast<size_t>(r)][s];
  };
  if (!TakesArrivals(kernel, layer, plan, transport, throttle)) {
    cost->compute_seconds = of_step;
    return;
  }
  const auto taking = std::make_shared<TakingSteps>(FindTaking(layer, plan, machine));
  cost->compute_seconds = [=](int r, size_t s) {
    const auto step = taking->find({r, s});
    return of_step(r, s) + (step == taking->end() ? 0 : step->second.rest);
  };
  cost->arrival_seconds = [=](int r, size_t s, size_t receive) {
    const Taking& step = taking->at({r, s});
    return step.share.at(receive) * of_step(r, s) + step.rest / static_cast<double>(step.share.size());
  };
}

RowBytes::RowBytes(const AttentionCase& layer, const ExchangePlan& plan, absl::Span<const RankPlan> ranks) {
  for (const RankPlan& rank : ranks) {
    for (const SlotSpec& slot : rank.slots) {
      const auto [known, first] = bytes_.try_emplace(KeyOf(slot), 0);
      if (first) known->second = BytesOfRow(layer, plan.pass, GroupOf(layer, plan, slot), slot);
    }
  }
}

int64_t RowBytes::Of(const SlotSpec& slot) const {
  const auto known = bytes_.find(KeyOf(slot));
  ANNULUS_CHECK(known != bytes_.end()) << "a slot of another plan";
  return known->second;
}

absl::Status CheckLinks(const MachineProfile& machine, TransportKind transport, int ranks) {
  if (ranks == 1) return absl::OkStatus();
  const auto missing = [&](const char* where, const char* expected) {
    return Invalid("machine profile of ", machine.device, ": no rates of messages", where, " by ",
                   Name(transport), expected);
  };
  if (FindInside(machine, transport) == nullptr) {
    return missing("", machine.measured && machine.ranks == 1
                           ? ", as it was measured with 1 rank: expected a profile that launch/mpirun -n 2 "
                             "annulus calibrate wrote"
                           : ": expected a profile that launch/mpirun -n 2 annulus calibrate wrote");
  }
  if (OnSeveralHosts(machine, ranks) && FindIn(machine.network.links, transport) == nullptr)
    return missing(" between hosts", ": expected network { link { ... } } of it");
  return absl::OkStatus();
}

MessageTime LeastMessageTime(const MachineProfile& machine, TransportKind transport, int ranks, double bytes,
                             bool between_hosts) {
  const LinkRate* link = FindInside(machine, transport);
  if (link == nullptr) return {};
  LinkTimes times = TimesOf(*link, bytes);
  const LinkRate* other = OnSeveralHosts(machine, ranks) ? FindIn(machine.network.links, transport) : nullptr;
  if (other != nullptr) {  // plans between hosts wait for the slower overhead and latency (SetRates)
    const LinkTimes outside = TimesOf(*other, bytes);
    const double fastest = std::max(times.per_second, outside.per_second);
    times = {.per_second = between_hosts ? outside.per_second : fastest,
             .overhead = std::max(times.overhead, outside.overhead),
             .latency = std::max(times.latency, outside.latency)};
  }
  return {.overhead = times.overhead, .moving = bytes / times.per_second, .latency = times.latency};
}

ExchangeCost MessageCostOf(const AttentionCase& layer, const ExchangePlan& plan,
                           const MachineProfile& machine, TransportKind transport, LinkThrottle throttle) {
  ExchangeCost cost;
  const auto row_bytes = std::make_shared<RowBytes>(layer, plan);
  cost.row_bytes = [row_bytes](const SlotSpec& slot) { return static_cast<double>(row_bytes->Of(slot)); };
  const auto ranks = static_cast<int>(plan.ranks.size());
  const LinkRate* link = FindInside(machine, transport);
  if (link == nullptr) return cost;  // one rank
  const bool several = OnSeveralHosts(machine, ranks);
  SetRates(*link, several ? FindIn(machine.network.links, transport) : nullptr, machine, throttle,
           MessageBytesOf(plan, cost), &cost);
  return cost;
}

std::map<int, int64_t> BytesSentBy(int rank, const AttentionCase& layer, const ExchangePlan& plan) {
  const RankPlan& own = plan.ranks[static_cast<size_t>(rank)];
  const RowBytes row_bytes(layer, plan, {&own, 1});
  std::map<int, int64_t> sent;
  for (const Step& step : own.steps) {
    if (step.kind != StepKind::kSend) continue;
    sent[step.peer] += step.rows.rows.size() * row_bytes.Of(own.slots[static_cast<size_t>(step.slot)]);
  }
  return sent;
}

ExchangeCost CostOf(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine,
                    TransportKind transport, LinkThrottle throttle) {
  const absl::Status known = CheckLinks(machine, transport, static_cast<int>(plan.ranks.size()));
  ANNULUS_CHECK(known.ok()) << known;
  ExchangeCost cost = MessageCostOf(layer, plan, machine, transport, throttle);
  SetComputing(layer, plan, machine, transport, throttle,
               std::make_shared<const StepSeconds>(ComputeSecondsOf(layer, plan, machine)), &cost);
  return cost;
}

}  // namespace annulus
