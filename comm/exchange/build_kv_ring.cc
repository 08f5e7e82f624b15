// KV ring, pruned: the steps of each rank. kv_ring_visits.h tells which blocks travel along which chains.
//
// Gradients (backward) pass along the chains of KV, one hop behind: each rank computes its part into one of
// two partial slots, adds what arrived from the rank before, and sends the sum on; rows that no later rank of
// the chain needs go home at once. For causal zigzag toward lower ranks that is 0.75 of all rows, as it is
// for KV.

#include <algorithm>
#include <array>
#include <optional>

#include "kv_ring_visits.h"

namespace annulus {
namespace {

// Place of a step in its rank's list. Both ends of a message have the same, so messages of a pair of ranks
// are listed in one order; and every step comes after all that it waits for.
enum Phase { kMoveKv, kCompute, kMoveGrad, kJoin, kJoinHome };
struct Place {
  int distance = 0;
  Phase phase = kMoveKv;
  bool home = false;  // a gradient that goes home
  int64_t row = 0;
  friend auto operator<=>(const Place&, const Place&) = default;
};

// The list of one rank while it is built. Steps are named by the order in which they are added.
class RankBuilder {
 public:
  int AddSlot(Payload payload, bool home) {
    plan_.slots.push_back({payload, home});
    return static_cast<int>(plan_.slots.size()) - 1;
  }
  int Add(const Place& place, Step step) {
    places_.push_back(place);
    plan_.steps.push_back(std::move(step));
    return static_cast<int>(plan_.steps.size()) - 1;
  }
  void SetAfter(int id, std::vector<int> after) {
    plan_.steps[static_cast<size_t>(id)].after = std::move(after);
  }
  const Step& step(int id) const { return plan_.steps[static_cast<size_t>(id)]; }

  RankPlan Finish() {
    std::vector<int> order(places_.size()), position(places_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return places_[static_cast<size_t>(a)] < places_[static_cast<size_t>(b)];
    });
    for (size_t i = 0; i < order.size(); ++i) position[static_cast<size_t>(order[i])] = static_cast<int>(i);
    RankPlan sorted{.slots = std::move(plan_.slots)};
    for (const int id : order) {
      sorted.steps.push_back(std::move(plan_.steps[static_cast<size_t>(id)]));
      std::vector<int>& after = sorted.steps.back().after;
      for (int& dependency : after) dependency = position[static_cast<size_t>(dependency)];
      std::sort(after.begin(), after.end());
    }
    return sorted;
  }

 private:
  RankPlan plan_;
  std::vector<Place> places_;
};

// All steps of one rank.
class RingRank {
 public:
  RingRank(const Ring& ring, Pass pass, int cp_rank)
      : ring_(ring), pass_(pass), cp_rank_(cp_rank), visits_(ring.visits[static_cast<size_t>(cp_rank)]) {}

  RankPlan Build() {
    AddSlots();
    AddHome();
    for (size_t n = 0; n < visits_.size(); ++n) AddVisit(n);
    if (pass_ == Pass::kBackward) AddReturns();
    return list_.Finish();
  }

 private:
  bool backward() const { return pass_ == Pass::kBackward; }
  const std::vector<Visit*>& own_route() const { return ring_.routes[static_cast<size_t>(cp_rank_)]; }

  void AddSlots() {
    const size_t buffers = std::min<size_t>(2, visits_.size());
    home_kv_ = list_.AddSlot(Payload::kKv, true);
    for (size_t i = 0; i < buffers; ++i) kv_slots_[i] = list_.AddSlot(Payload::kKv, false);
    if (!backward()) return;
    home_grad_ = list_.AddSlot(Payload::kKvGrad, true);
    for (size_t i = 0; i < buffers; ++i) partial_slots_[i] = list_.AddSlot(Payload::kKvGrad, false);
    const bool receives =
        std::any_of(visits_.begin(), visits_.end(), [](const Visit& v) { return !v.grad_in.empty(); });
    if (receives) grad_in_slot_ = list_.AddSlot(Payload::kKvGrad, false);
    if (!own_route().empty()) return_slot_ = list_.AddSlot(Payload::kKvGrad, false);
  }

  // One kSend or kReceive for each range of `rows`; returns their names.
  std::vector<int> AddMoves(Step step, const RowSet& rows, int first_message, Place place) {
    std::vector<int> ids;
    step.message = first_message;
    for (const RowRange& range : rows.ranges()) {
      step.rows = range;
      place.row = range.begin;
      ids.push_back(list_.Add(place, step));
      ++step.message;
    }
    return ids;
  }

  // Those of `ids` whose rows `rows` overlap.
  std::vector<int> Touching(const std::vector<int>& ids, const RowRange& rows) const {
    std::vector<int> result;
    for (const int id : ids) {
      if (Overlap(list_.step(id).rows, rows)) result.push_back(id);
    }
    return result;
  }

  void AddHomeAttend(std::vector<BlockPair> pairs, int distance) {
    if (pairs.empty()) return;
    Step attend{.kind = StepKind::kAttend,
                .slot = home_kv_,
                .grad_slot = home_grad_,
                .block = cp_rank_,
                .rows = NeedsOf(pairs).hull(),
                .pairs = std::move(pairs)};
    list_.Add({.distance = distance, .phase = kCompute}, std::move(attend));
  }

  void AddHome() {
    std::vector<BlockPair> first = ring_.own_pairs[static_cast<size_t>(cp_rank_)], last;
    if (backward() && !visits_.empty()) {
      // Pairs of different chunks are computed while the first block arrives, the others while the last
      // gradients travel.
      const auto middle = std::stable_partition(
          first.begin(), first.end(), [](const BlockPair& pair) { return pair.q_chunk != pair.kv_chunk; });
      if (middle != first.begin()) {
        last.assign(middle, first.end());
        first.erase(middle, first.end());
      }
    }
    AddHomeAttend(std::move(first), 0);
    if (!last.empty()) AddHomeAttend(std::move(last), visits_.back().distance + 1);
    for (const Visit* visit : own_route()) {
      if (visit->previous != nullptr) continue;
      AddMoves(
          {.kind = StepKind::kSend, .slot = home_kv_, .block = cp_rank_, .peer = visit->cp_rank, .after = {}},
          visit->kv_in, visit->kv_message, {.distance = visit->distance, .phase = kMoveKv});
    }
  }

  void AddVisit(size_t n) {
    const Visit& visit = visits_[n];
    const size_t parity = n % 2;
    const int slot = kv_slots_[parity];
    const int from = visit.previous == nullptr ? visit.block : visit.previous->cp_rank;
    const std::vector<int> arrivals =
        AddMoves({.kind = StepKind::kReceive,
                  .slot = slot,
                  .block = visit.block,
                  .peer = from,
                  .after = kv_users_[parity]},
                 visit.kv_in, visit.kv_message, {.distance = visit.distance, .phase = kMoveKv});

    RowSet sum = visit.grad_in;
    sum.Add(visit.needs);
    Step attend{.kind = StepKind::kAttend,
                .slot = slot,
                .grad_slot = partial_slots_[parity],
                .grad_write = backward() ? GradWrite::kOverwrite : GradWrite::kAccumulate,
                .block = visit.block,
                .rows = backward() ? sum.hull() : visit.needs.hull(),
                .pairs = visit.pairs,
                .after = partial_users_[parity]};
    for (const int arrival : arrivals) {
      const RowRange& rows = list_.step(arrival).rows;
      const bool read = std::any_of(visit.pairs.begin(), visit.pairs.end(),
                                    [&](const BlockPair& pair) { return Overlap(pair.keys, rows); });
      if (read) attend.after.push_back(arrival);
    }
    const int attended = list_.Add({.distance = visit.distance, .phase = kCompute}, std::move(attend));

    kv_users_[parity] = {attended};
    if (visit.next != nullptr) {
      const std::vector<int> sends = AddMoves(
          {.kind = StepKind::kSend, .slot = slot, .block = visit.block, .peer = visit.next->cp_rank},
          visit.next->kv_in, visit.next->kv_message, {.distance = visit.next->distance, .phase = kMoveKv});
      for (const int send : sends) list_.SetAfter(send, Touching(arrivals, list_.step(send).rows));
      kv_users_[parity].insert(kv_users_[parity].end(), sends.begin(), sends.end());
    }
    if (backward()) AddGradient(n, attended);
  }

  // What happens to the gradient of visit n once its attend has written this rank's part.
  void AddGradient(size_t n, int attended) {
    const Visit& visit = visits_[n];
    const int partial = partial_slots_[n % 2];
    const int from = visit.previous == nullptr ? -1 : visit.previous->cp_rank;
    const std::vector<int> arrivals =
        AddMoves({.kind = StepKind::kReceive,
                  .slot = grad_in_slot_,
                  .block = visit.block,
                  .peer = from,
                  .after = AsList(grad_in_user_)},
                 visit.grad_in, visit.grad_message, {.distance = visit.distance, .phase = kMoveGrad});
    const std::vector<int> joins = AddJoins(arrivals, partial, {.distance = visit.distance, .phase = kJoin});
    if (!joins.empty()) grad_in_user_ = joins.back();

    std::vector<int> sends;
    if (visit.next != nullptr) {
      sends = AddMoves(
          {.kind = StepKind::kSend, .slot = partial, .block = visit.block, .peer = visit.next->cp_rank},
          visit.next->grad_in, visit.next->grad_message,
          {.distance = visit.next->distance, .phase = kMoveGrad});
    }
    const std::vector<int> returns = AddMoves(
        {.kind = StepKind::kSend, .slot = partial, .block = visit.block, .peer = visit.block, .after = {}},
        visit.grad_home, visit.home_message,
        {.distance = visit.distance + 1, .phase = kMoveGrad, .home = true});
    sends.insert(sends.end(), returns.begin(), returns.end());
    for (const int send : sends) {
      const std::vector<int> touching = Touching(joins, list_.step(send).rows);
      list_.SetAfter(send, {touching.empty() ? attended : touching.back()});  // computing steps run in order
    }
    partial_users_[n % 2] = sends;
  }

  // Adds what `arrivals` brought to `into`.
  std::vector<int> AddJoins(const std::vector<int>& arrivals, int into, Place place) {
    std::vector<int> joins;
    for (const int arrival : arrivals) {
      const Step& received = list_.step(arrival);
      place.row = received.rows.begin;
      Step join{.kind = StepKind::kReduce,
                .slot = received.slot,
                .grad_slot = into,
                .block = received.block,
                .rows = received.rows,
                .after = {arrival}};
      joins.push_back(list_.Add(place, std::move(join)));
    }
    return joins;
  }

  // The gradient of this rank's own block comes home. Rows return once on each chain, so only rows of another
  // chain have to wait for the slot.
  void AddReturns() {
    std::vector<int> earlier;
    for (const Visit* visit : own_route()) {
      const int distance = visit->distance + 1;  // one visit later, so that the transfer is hidden by it
      const std::vector<int> arrivals = AddMoves(
          {.kind = StepKind::kReceive, .slot = return_slot_, .block = cp_rank_, .peer = visit->cp_rank},
          visit->grad_home, visit->home_message, {.distance = distance, .phase = kMoveGrad, .home = true});
      for (const int arrival : arrivals) {
        const std::vector<int> touching = Touching(earlier, list_.step(arrival).rows);
        if (!touching.empty()) list_.SetAfter(arrival, {touching.back()});
      }
      const std::vector<int> joins =
          AddJoins(arrivals, home_grad_, {.distance = distance, .phase = kJoinHome});
      earlier.insert(earlier.end(), joins.begin(), joins.end());
    }
  }

  static std::vector<int> AsList(const std::optional<int>& id) {
    return id.has_value() ? std::vector<int>{*id} : std::vector<int>{};
  }

  const Ring& ring_;
  const Pass pass_;
  const int cp_rank_;
  const std::vector<Visit>& visits_;
  RankBuilder list_;
  int home_kv_ = -1, home_grad_ = -1, grad_in_slot_ = -1, return_slot_ = -1;
  std::array<int, 2> kv_slots_{-1, -1}, partial_slots_{-1, -1};
  std::array<std::vector<int>, 2> kv_users_, partial_users_;  // since the slot's last receive or overwrite
  std::optional<int> grad_in_user_;
};

int64_t RowsSent(const ExchangePlan& plan) {
  int64_t rows = 0;
  for (int r = 0; r < plan.problem.ranks; ++r) rows += BytesSent(plan, r, 1, 1);
  return rows;
}

}  // namespace

ExchangePlan BuildKvRing(const ExchangeProblem& problem, Pass pass, RingDirection direction) {
  if (direction == RingDirection::kFewestBytes) {
    ExchangePlan lower = BuildKvRing(problem, pass, RingDirection::kTowardLower);
    ExchangePlan higher = BuildKvRing(problem, pass, RingDirection::kTowardHigher);
    return RowsSent(higher) < RowsSent(lower) ? higher : lower;
  }
  const bool lower = direction == RingDirection::kTowardLower;
  ExchangePlan plan{.name = lower ? "kv_ring toward lower ranks" : "kv_ring toward higher ranks",
                    .pass = pass,
                    .problem = problem};
  const Ring ring = FindRing(problem, pass, lower ? RingStep::kLower : RingStep::kHigher);
  for (int r = 0; r < problem.ranks; ++r) plan.ranks.push_back(RingRank(ring, pass, r).Build());
  return plan;
}

}  // namespace annulus
