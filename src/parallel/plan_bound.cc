#include "annulus/parallel/plan_bound.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "plan_cost.h"
#include "slot_fields.h"

namespace annulus {
namespace {

// Tiles of kernels are no larger, each way; what they compute beside a call's pairs counts as its size.
constexpr double kLargestTile = 256;

// ---- Computing ----------------------------------------------------------------------------------

double PairsOfHead(const AttentionCase& layer) {
  const SequenceLayout whole(LayoutKind::kContiguous, layer.layout.length(), 1);
  const ExchangeProblem problem = MakeExchangeProblem(whole, layer.sequences, layer.window, 1, 1, 1);
  return static_cast<double>(problem.pairs_of(0, 0));
}

// Of calls of at most so many pairs.
double FastestPairRate(const AttentionCase& layer, Pass pass, const MachineProfile& machine, double most) {
  double fastest = 0;
  const double flops = FlopsPerPair(pass, layer.head_dim, layer.v_head_dim);
  for (const AttentionRate& rate : machine.attention) {
    if (rate.pass != pass) continue;
    double per_second = RateAt(rate.pairs, most);
    for (const RatePoint& point : rate.pairs) {
      if (point.size <= most) per_second = std::max(per_second, point.per_second);
    }
    fastest = std::max(fastest, per_second * FlopsPerPair(pass, rate.head_dim, rate.v_head_dim) / flops);
  }
  return fastest;
}

// Of a group of ranks that have as many heads as any: with more ranks than heads some have none.
double ComputeSeconds(const AttentionCase& layer, Pass pass, int split, const MachineProfile& machine) {
  const double heads = std::ceil(static_cast<double>(layer.heads) / split);
  const double places = static_cast<double>(layer.layout.ranks()) / split;
  const double rows = static_cast<double>(layer.layout.local_rows() * split) + kLargestTile;
  const double most = static_cast<double>(layer.sequences.batch) * rows * rows * heads;
  return PairsOfHead(layer) * heads / places / FastestPairRate(layer, pass, machine, most);
}

// ---- Bytes between hosts ------------------------------------------------------------------------

// Positions that are in any of the ranges.
int64_t UnionSize(std::vector<KeyRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const KeyRange& a, const KeyRange& b) { return a.lo < b.lo; });
  int64_t size = 0, covered = 0;
  for (const KeyRange& range : ranges) {
    size += std::max<int64_t>(0, range.hi - std::max(covered, range.lo));
    covered = std::max(covered, range.hi);
  }
  return size;
}

// Positions whose keys any query in [first, last] sees, or whose queries see any key there.
enum class Seen { kKeys, kQueries };
KeyRange SeenFrom(const AttentionCase& layer, Seen what, int64_t first, int64_t last) {
  const int64_t length = layer.layout.length();
  const bool causal = layer.sequences.visibility == Visibility::kCausal;
  const int64_t window = layer.window > 0 ? layer.window - 1 : length;
  const bool above = what == Seen::kQueries || !causal, below = what == Seen::kKeys || !causal;
  return {below ? std::max<int64_t>(0, first - window) : first,
          std::min(length, above ? last + window + 1 : last + 1)};
}

// Rows that come to a host, in the mean over hosts. Positions of a strided chunk are all taken for seen where
// its first and last are; that is so only without a window.
double RowsFromElsewhere(const AttentionCase& layer, Seen what, int on_host) {
  const int64_t length = layer.layout.length();
  if (layer.window > 0 && layer.layout.chunks(0).front().stride > 1) return 0;
  const int hosts = layer.layout.ranks() / on_host;
  double rows = 0;
  for (int host = 0; host < hosts; ++host) {
    std::vector<KeyRange> seen;
    for (int r = host * on_host; r < (host + 1) * on_host; ++r) {
      for (const LayoutChunk& chunk : layer.layout.chunks(r)) {
        const int64_t here = (length - 1 - chunk.position) / chunk.stride;  // the rest is padding
        const int64_t last = chunk.position + chunk.stride * std::min(here, chunk.rows - 1);
        if (chunk.position < length) seen.push_back(SeenFrom(layer, what, chunk.position, last));
      }
    }
    const int64_t own = on_host * layer.layout.local_rows();
    rows += static_cast<double>(std::max<int64_t>(0, UnionSize(std::move(seen)) - own));
  }
  return rows / hosts;
}

// Of one row of all heads.
double AllHeadsBytes(const AttentionCase& layer, Pass pass, std::initializer_list<Payload> payloads) {
  int64_t bytes = 0;
  for (const Payload payload : payloads)
    bytes += BytesOfRow(layer, pass, AllHeadsOf(layer), {.payload = payload, .width = Width::kCompute});
  return static_cast<double>(bytes);
}

// ---- Rings --------------------------------------------------------------------------------------

// Of a place that gets the blocks of all others, one behind the other: they go through one link, whose
// messages of operands take turns, and NCCL's rounds end with theirs; and each of its slots takes one block
// after the other, waits for its message, then for the computing on it. Sizes of messages differ a little
// within a plan, whose costs are straight lines around their mean.
double RingSeconds(const AttentionCase& layer, Pass pass, const PlanChoice& choice, double computing,
                   TransportKind transport, const MachineProfile& machine) {
  constexpr double kNearMean = 0.9;
  const int ranks = layer.layout.ranks(), places = ranks / choice.head_split;
  const bool double_ring = choice.kind == PlanKind::kDoubleRing;
  const bool queries = choice.kind == PlanKind::kTokenRing;
  if (choice.kind != PlanKind::kKvRing && !queries && !double_ring) return 0;
  if (layer.window > 0 || !layer.sequences.document_starts.empty() || choice.parts > 1 || places < 3)
    return 0;
  const int on_host = machine.network.ranks_per_host;
  const bool between = on_host > 0 && ranks > on_host && choice.head_split % on_host == 0;
  // Half of a block at least is seen.
  const double rows = static_cast<double>(layer.layout.local_rows() * choice.head_split) / 2;
  const double bytes =
      rows * AllHeadsBytes(layer, pass, {queries ? Payload::kQuery : Payload::kKv}) / choice.head_split;
  const MessageTime message = LeastMessageTime(machine, transport, ranks, bytes, between);
  // Of a double ring those from the same node; the wrap of a ring and what goes on to the next node are on
  // other links.
  const int same_link = places - (double_ring ? places / choice.inner : 1);
  const double in_turn =
      transport == TransportKind::kNccl ? message.seconds() : message.seconds() - message.latency;
  const double link_seconds = kNearMean * same_link * in_turn;
  // What goes on to the next node is kept while it goes round this one.
  const int slots = choice.buffers + (double_ring ? 1 : 0);
  // A rank's own block is computed on without.
  const double slot_seconds =
      (kNearMean * (places - 1) * message.seconds() + computing * (places - 2) / places) / slots;
  return std::max(link_seconds, slot_seconds);
}

double HostBytes(const AttentionCase& layer, Pass pass, const PlanChoice& choice, int on_host) {
  const int ranks = layer.layout.ranks();
  if (on_host <= 0 || ranks <= on_host || ranks % on_host != 0) return 0;
  if (!layer.sequences.document_starts.empty()) return 0;
  const bool forward = pass == Pass::kForward;
  const double keys = forward ? AllHeadsBytes(layer, pass, {Payload::kKv})
                              : AllHeadsBytes(layer, pass, {Payload::kKv, Payload::kKvGrad});
  const double queries =
      AllHeadsBytes(layer, pass, {Payload::kQuery, forward ? Payload::kOutput : Payload::kQueryGrad});
  // Heads go over all ranks: rows of all blocks for a rank's share of the heads.
  if (choice.head_split == ranks) {
    const double share = static_cast<double>(on_host) / ranks * static_cast<double>(ranks - on_host);
    return share * static_cast<double>(layer.layout.local_rows()) * (keys + queries);
  }
  if (on_host % choice.head_split != 0) return 0;  // heads are shared out between hosts
  switch (choice.kind) {
    case PlanKind::kAllGather:
    case PlanKind::kArena:
    case PlanKind::kKvRing:
    case PlanKind::kBidirectionalKvRing:
    case PlanKind::kDirectCast:
    case PlanKind::kDoubleRing:
      return RowsFromElsewhere(layer, Seen::kKeys, on_host) * keys;
    case PlanKind::kTokenRing:
    case PlanKind::kBidirectionalTokenRing:
      return RowsFromElsewhere(layer, Seen::kQueries, on_host) * queries;
    case PlanKind::kBalanced:
    case PlanKind::kMesh:
      return 0;
  }
  return 0;
}

}  // namespace

PlanBound BoundOfChoice(const AttentionCase& layer, Pass pass, const PlanChoice& choice,
                        TransportKind transport, const MachineProfile& machine) {
  const double computing = ComputeSeconds(layer, pass, choice.head_split, machine);
  return {.seconds = std::max(computing, RingSeconds(layer, pass, choice, computing, transport, machine)),
          .host_bytes = HostBytes(layer, pass, choice, machine.network.ranks_per_host)};
}

}  // namespace annulus
