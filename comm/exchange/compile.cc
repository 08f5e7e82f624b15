// The steps of each place of a scheme. A place's slots for what travels:
//
//   operands   one for each arrival until its last use, then for another: with `buffers` of them the next
//              operands come while one is computed on
//   partials   results for arrivals: written by their visits, added to by what comes from the arrival before,
//              sent on or home
//   incoming   partial results on their way through, until they are added to the place's own part
//   returning  partial results that come home, until they are added to the home slot

#include <algorithm>
#include <map>

#include "scheme.h"
#include "step_list.h"
#include "visits.h"

namespace annulus {
namespace {

size_t Index(Side side) { return static_cast<size_t>(side); }

// Slots of one kind on one place, taken again once what was in them is done with.
class SlotPool {
 public:
  struct Use {
    int slot = -1;
    int last_visit = 0;           // of what is or was in it
    int free_step = 0;            // all messages from or into it are listed before this step or in it
    std::vector<int> users = {};  // steps that must be complete before it is used anew
  };

  // A slot for something of which `first_visit` is the first to use it, in step `first_step`. `between`
  // visits lie between the last use of what was in it and that. The use is good until the next Take.
  Use* Take(StepList* list, const SlotSpec& spec, int first_visit, int first_step, int between) {
    Use* best = nullptr;
    for (Use& use : uses_) {
      const bool fits = use.last_visit + between < first_visit && use.free_step < first_step;
      if (fits && (best == nullptr || use.last_visit < best->last_visit)) best = &use;
    }
    if (best != nullptr) return best;
    uses_.push_back({.slot = list->AddSlot(spec)});
    return &uses_.back();
  }

  Use* Of(int slot) {
    const auto use = std::find_if(uses_.begin(), uses_.end(), [&](const Use& u) { return u.slot == slot; });
    ANNULUS_CHECK(use != uses_.end()) << "slot " << slot;
    return &*use;
  }

 private:
  std::vector<Use> uses_;
};

struct ArrivalSteps {
  int slot = -1;
  std::vector<int> receives = {};
  int result_slot = -1;
  std::vector<int> result_ready = {};  // before the partial slot may be written
  bool written = false;
  std::vector<int> joins = {};
};

// What leaves and reaches the homes of blocks, [block], in order of the other place.
struct HomeTraffic {
  std::vector<std::vector<const Arrival*>> sent, returning;
};
using HomesOfSides = std::array<HomeTraffic, 2>;

HomesOfSides FindHomes(const std::vector<PlaceVisits>& places) {
  HomesOfSides homes;
  for (const Side side : kSides) {
    HomeTraffic& traffic = homes[Index(side)];
    traffic.sent.resize(places.size());
    traffic.returning.resize(places.size());
    for (const PlaceVisits& place : places) {
      for (const auto& arrival : place.arrivals[Index(side)]) {
        const auto home = static_cast<size_t>(arrival->block);
        if (arrival->source == nullptr) traffic.sent[home].push_back(arrival.get());
        if (arrival->has_result && !arrival->result_home.empty())
          traffic.returning[home].push_back(arrival.get());
      }
    }
    for (auto& returning : traffic.returning) {
      std::stable_sort(returning.begin(), returning.end(),
                       [](const Arrival* a, const Arrival* b) { return a->home_step() < b->home_step(); });
    }
  }
  return homes;
}

class PlaceCompiler {
 public:
  PlaceCompiler(const ExchangeProblem& problem, Pass pass, const Scheme& scheme,
                const std::vector<PlaceVisits>& places, const HomesOfSides& homes, int place)
      : problem_(problem),
        pass_(pass),
        scheme_(scheme),
        homes_(homes),
        me_(place),
        mine_(places[static_cast<size_t>(place)]) {}

  RankPlan Build() {
    home_operand_ = {AddHome(Payload::kQuery), AddHome(Payload::kKv)};
    home_result_[0] = AddHome(ResultPayload(Side::kQuery));
    if (pass_ == Pass::kBackward) home_result_[1] = AddHome(Payload::kKvGrad);
    for (const Side side : kSides) SendFromHome(side);
    for (size_t v = 0; v < mine_.visits.size(); ++v) {
      for (const Side side : kSides) BeginArrival(side, static_cast<int>(v));
      AddVisit(static_cast<int>(v));
      for (const Side side : kSides) EndArrival(side, static_cast<int>(v));
    }
    for (const Side side : kSides) AddReturns(side);
    return list_.Finish();
  }

 private:
  int AddHome(Payload payload) { return list_.AddSlot({.payload = payload, .home = true}); }
  Payload ResultPayload(Side side) const {
    if (side == Side::kKv) return Payload::kKvGrad;
    return pass_ == Pass::kForward ? Payload::kOutput : Payload::kQueryGrad;
  }
  // Of partial results: one that is written by a single visit can be rounded there.
  SlotSpec PartialSpec(const Arrival& arrival) const {
    SlotSpec spec{.payload = ResultPayload(arrival.side)};
    const bool once = arrival.first_visit == arrival.last_visit && arrival.result_in.empty();
    if (spec.payload == Payload::kOutput && once) spec.width = scheme_.output_width;
    return spec;
  }
  SlotPool& PartialsOf(const SlotSpec& spec) { return partials_[{spec.payload, spec.width}]; }
  static Place PlaceOf(const Arrival& arrival, int step, Phase phase) {
    return {.step = step,
            .phase = phase,
            .side = static_cast<int>(arrival.side),
            .block = arrival.block,
            .part = arrival.part};
  }

  // One kSend or kReceive for each range of `rows`; returns their names. `after` says what each waits for.
  template <typename After>
  std::vector<int> AddMoves(Step step, int block, const RowSet& rows, Place place, const After& after) {
    std::vector<int> ids;
    for (const RowRange& range : rows.ranges()) {
      step.rows = {.block = block, .rows = range};
      step.after = after(range);
      place.row = range.begin;
      ids.push_back(list_.Add(place, step));
      ++step.message;
    }
    return ids;
  }

  void SendFromHome(Side side) {
    for (const Arrival* arrival : homes_[Index(side)].sent[static_cast<size_t>(me_)]) {
      AddMoves({.kind = StepKind::kSend,
                .slot = home_operand_[Index(side)],
                .peer = arrival->place,
                .message = arrival->message},
               me_, arrival->rows_in, PlaceOf(*arrival, arrival->first_step, kMoveOperand),
               [](const RowRange&) { return std::vector<int>(); });
    }
  }

  const Arrival* ArrivalOf(Side side, int v) const {
    const Visit& visit = mine_.visits[static_cast<size_t>(v)];
    const int block = visit.block[Index(side)];
    return block == me_ ? nullptr : mine_.Find(side, block, visit.part);
  }

  // The operand comes, and is handed on; the partial result gets its slot.
  void BeginArrival(Side side, int v) {
    const Arrival* arrival = ArrivalOf(side, v);
    if (arrival == nullptr || arrival->first_visit != v) return;
    ArrivalSteps& steps = steps_[arrival];
    const SlotSpec spec{.payload = side == Side::kQuery ? Payload::kQuery : Payload::kKv};
    SlotPool::Use* use = operands_[Index(side)].Take(&list_, spec, arrival->first_visit, arrival->first_step,
                                                     scheme_.buffers - 1);
    steps.slot = use->slot;
    const int from = arrival->source == nullptr ? arrival->block : arrival->source->place;
    const std::vector<int> before = std::move(use->users);
    steps.receives =
        AddMoves({.kind = StepKind::kReceive, .slot = use->slot, .peer = from, .message = arrival->message},
                 arrival->block, arrival->rows_in, PlaceOf(*arrival, arrival->first_step, kMoveOperand),
                 [&](const RowRange&) { return before; });
    *use = {.slot = use->slot, .last_visit = arrival->last_visit, .free_step = arrival->last_step};
    for (const Arrival* sink : arrival->sinks) {
      const std::vector<int> sends = AddMoves(
          {.kind = StepKind::kSend, .slot = use->slot, .peer = sink->place, .message = sink->message},
          arrival->block, sink->rows_in, PlaceOf(*sink, sink->first_step, kMoveOperand),
          [&](const RowRange& rows) { return list_.Touching(steps.receives, rows); });
      use->users.insert(use->users.end(), sends.begin(), sends.end());
      use->free_step = std::max(use->free_step, sink->first_step);
    }
    if (arrival->has_result) BeginPartial(*arrival, &steps);
  }

  void BeginPartial(const Arrival& arrival, ArrivalSteps* steps) {
    const SlotSpec spec = PartialSpec(arrival);
    SlotPool::Use* use = PartialsOf(spec).Take(&list_, spec, arrival.first_visit, arrival.first_step, 1);
    steps->result_slot = use->slot;
    steps->result_ready = std::move(use->users);
    *use = {.slot = use->slot, .last_visit = arrival.last_visit};
    if (!arrival.result_home.empty()) use->free_step = arrival.home_step();
    if (arrival.onward != nullptr) use->free_step = std::max(use->free_step, arrival.onward->result_step());
  }

  // Operand and result slots of one side of a visit.
  void BindSide(Side side, int v, Step* step) {
    const Visit& visit = mine_.visits[static_cast<size_t>(v)];
    const Arrival* arrival = ArrivalOf(side, v);
    const bool query = side == Side::kQuery;
    Attend& attend = step->attend;
    (query ? attend.q_slot : attend.kv_slot) =
        arrival == nullptr ? home_operand_[Index(side)] : steps_[arrival].slot;
    RowSet rows = visit.needs[Index(side)];
    if (query || pass_ == Pass::kBackward) {
      (query ? attend.q_result : attend.kv_result) =
          arrival == nullptr ? home_result_[Index(side)] : steps_[arrival].result_slot;
    }
    if (arrival != nullptr) {
      ArrivalSteps& steps = steps_[arrival];
      for (const RowRange& range : visit.needs[Index(side)].ranges()) {
        const std::vector<int> receives = list_.Touching(steps.receives, range);
        step->after.insert(step->after.end(), receives.begin(), receives.end());
      }
      if (arrival->has_result && !steps.written) {
        steps.written = true;
        rows = arrival->needs;
        rows.Add(arrival->result_in);
        step->after.insert(step->after.end(), steps.result_ready.begin(), steps.result_ready.end());
        (query ? attend.q_write : attend.kv_write) = ResultWrite::kOverwrite;
      }
    }
    for (const RowRange& range : rows.ranges())
      (query ? attend.q_rows : attend.kv_rows).push_back({visit.block[Index(side)], range});
  }

  void AddVisit(int v) {
    const Visit& visit = mine_.visits[static_cast<size_t>(v)];
    Step step{.kind = StepKind::kAttend};
    step.attend.pairs = visit.pairs;
    for (const Side side : kSides) BindSide(side, v, &step);
    last_attend_ = list_.Add({.step = visit.step, .phase = kCompute, .row = v}, std::move(step));
  }

  void EndArrival(Side side, int v) {
    const Arrival* arrival = ArrivalOf(side, v);
    if (arrival == nullptr || arrival->last_visit != v) return;
    // Computing steps run in order: the last one stands for all.
    operands_[Index(side)].Of(steps_[arrival].slot)->users.push_back(last_attend_);
    if (arrival->has_result) EndPartial(*arrival);
  }

  void EndPartial(const Arrival& arrival) {
    ArrivalSteps& steps = steps_[&arrival];
    if (!arrival.result_in.empty()) AddIncoming(arrival, &steps);
    const auto ready = [&](const RowRange& rows) {
      std::vector<int> after = list_.Touching(steps.joins, rows);
      after.push_back(last_attend_);
      return after;
    };
    std::vector<int>& users = PartialsOf(PartialSpec(arrival)).Of(steps.result_slot)->users;
    Step send{.kind = StepKind::kSend, .slot = steps.result_slot};
    if (arrival.onward != nullptr) {
      send.peer = arrival.onward->place;
      send.message = arrival.onward->result_message;
      users = AddMoves(send, arrival.block, arrival.onward->result_in,
                       PlaceOf(*arrival.onward, arrival.onward->result_step(), kMoveResult), ready);
    }
    send.peer = arrival.block;
    send.message = arrival.home_message;
    Place place = PlaceOf(arrival, arrival.home_step(), kMoveResult);
    place.home = true;
    const std::vector<int> sends = AddMoves(send, arrival.block, arrival.result_home, place, ready);
    users.insert(users.end(), sends.begin(), sends.end());
  }

  // What the arrival before made of the result comes and is added.
  void AddIncoming(const Arrival& arrival, ArrivalSteps* steps) {
    const SlotSpec spec{.payload = ResultPayload(arrival.side)};
    SlotPool::Use* use =
        incoming_[Index(arrival.side)].Take(&list_, spec, arrival.last_visit, arrival.result_step(), 0);
    steps->joins =
        AddJoins(arrival, arrival.result_in,
                 {.kind = StepKind::kReceive,
                  .slot = use->slot,
                  .peer = arrival.result_source->place,
                  .message = arrival.result_message},
                 PlaceOf(arrival, arrival.result_step(), kMoveResult), kJoin, use->users, steps->result_slot);
    *use = {.slot = use->slot,
            .last_visit = arrival.last_visit,
            .free_step = arrival.result_step(),
            .users = {steps->joins.back()}};
  }

  // Receives, each with a kReduce into `into`; returns those.
  std::vector<int> AddJoins(const Arrival& arrival, const RowSet& rows, const Step& receive, Place place,
                            Phase phase, const std::vector<int>& before, int into) {
    const std::vector<int> receives =
        AddMoves(receive, arrival.block, rows, place, [&](const RowRange&) { return before; });
    place.phase = phase;
    std::vector<int> joins;
    for (const int id : receives) {
      place.row = list_.step(id).rows.rows.begin;
      joins.push_back(list_.Add(place, {.kind = StepKind::kReduce,
                                        .slot = receive.slot,
                                        .into = into,
                                        .rows = list_.step(id).rows,
                                        .after = {id}}));
    }
    return joins;
  }

  // Partial results for this place's own block come home.
  void AddReturns(Side side) {
    std::map<Width, SlotPool> pools;
    for (const Arrival* arrival : homes_[Index(side)].returning[static_cast<size_t>(me_)]) {
      const SlotSpec spec = PartialSpec(*arrival);
      SlotPool::Use* use =
          pools[spec.width].Take(&list_, spec, arrival->home_step(), arrival->home_step(), 0);
      Place place = PlaceOf(*arrival, arrival->home_step(), kMoveResult);
      place.home = true;
      const std::vector<int> joins = AddJoins(*arrival, arrival->result_home,
                                              {.kind = StepKind::kReceive,
                                               .slot = use->slot,
                                               .peer = arrival->place,
                                               .message = arrival->home_message},
                                              place, kJoinHome, use->users, home_result_[Index(side)]);
      *use = {.slot = use->slot,
              .last_visit = arrival->home_step(),
              .free_step = arrival->home_step(),
              .users = {joins.back()}};
    }
  }

  const ExchangeProblem& problem_;
  const Pass pass_;
  const Scheme& scheme_;
  const HomesOfSides& homes_;
  const int me_;
  const PlaceVisits& mine_;
  StepList list_;
  std::array<int, 2> home_operand_{-1, -1}, home_result_{-1, -1};  // by side
  std::array<SlotPool, 2> operands_, incoming_;                    // by side
  std::map<std::pair<Payload, Width>, SlotPool> partials_;
  std::map<const Arrival*, ArrivalSteps> steps_;
  int last_attend_ = -1;
};

}  // namespace

ExchangePlan CompileScheme(const ExchangeProblem& problem, Pass pass, const Scheme& scheme) {
  ExchangePlan plan{.name = scheme.name, .pass = pass, .problem = problem};
  HeadGroup all{.q_begin = 0, .q_end = problem.heads};
  for (int64_t head = 0; head < problem.kv_heads; ++head) all.kv_heads.push_back(head);
  plan.groups = {all};
  const std::vector<PlaceVisits> places = FindVisits(problem, pass, scheme);
  const HomesOfSides homes = FindHomes(places);
  for (int p = 0; p < problem.ranks; ++p) {
    plan.ranks.push_back(PlaceCompiler(problem, pass, scheme, places, homes, p).Build());
  }
  return plan;
}

}  // namespace annulus
