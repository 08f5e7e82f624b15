// All KV that a rank needs in one buffer, on which one step computes. Rank 1 of 4:
//
//   arena     [ own rows: copied | rows of rank 2 | of rank 3 | of rank 0 ]  in order of position
//   messages  send to rank 0, then to 3, then to 2     each behind the one before, so that what comes first
//             receive from rank 2, from 3, from 0       comes at the full rate of the link
//   compute   [ attend: own rows ... rows of rank 2 ... as they come        ]
//
// Backward the step begins when all is there. Gradients of keys and values have an arena as well; their rows
// go to the homes, which add them up.

#include <map>
#include <tuple>

#include "row_set.h"
#include "scheme.h"

namespace annulus {
namespace {

// What all ranks share.
class Arenas {
 public:
  Arenas(const ExchangeProblem& p, Pass of) : problem(p), pass(of) {
    const auto ranks = static_cast<size_t>(p.ranks);
    needs_.resize(ranks * ranks);
    for (size_t kv = 0; kv < p.chunks.size(); ++kv) {
      RowSet rows;  // that the rank of the queries sees
      for (size_t q = 0; q < p.chunks.size(); ++q) {
        if (!p.keys_of(q, kv).empty()) rows.Add(p.keys_of(q, kv));
        const int to = p.chunks[q].owner;
        if (q + 1 < p.chunks.size() && p.chunks[q + 1].owner == to) continue;
        const int from = p.chunks[kv].owner;
        for (const RowRange& range : rows.ranges())
          needs_[static_cast<size_t>(from) * ranks + static_cast<size_t>(to)].push_back({from, range});
        rows = RowSet();
      }
    }
  }

  const ExchangeProblem& problem;
  const Pass pass;

  // Rows of the block of rank `from` that rank `to` needs, each range in one chunk.
  const std::vector<BlockRows>& RowsFor(int from, int to) const {
    return needs_[static_cast<size_t>(from * problem.ranks + to)];
  }

  int MessageOf(Payload payload, int from, int to, const BlockRows& rows) {
    const auto next = static_cast<int>(messages_.size());
    return messages_.try_emplace({payload, from, to, rows.rows.begin}, next).first->second;
  }

 private:
  using MessageKey = std::tuple<Payload, int, int, int64_t>;  // from, to, first row
  std::vector<std::vector<BlockRows>> needs_;                 // [from * ranks + to]
  std::map<MessageKey, int> messages_;
};

class ArenaRank {
 public:
  ArenaRank(Arenas* arenas, int cp_rank)
      : a_(*arenas), me_(cp_rank), forward_(a_.pass == Pass::kForward), ranks_(a_.problem.ranks) {}

  RankPlan Build() {
    attend_.q_slot = AddSlot({.payload = Payload::kQuery, .home = true});
    home_kv_ = AddSlot({.payload = Payload::kKv, .home = true});
    attend_.q_result = AddSlot({.payload = forward_ ? Payload::kOutput : Payload::kQueryGrad,
                                .home = true,
                                .width = Width::kCompute});
    attend_.kv_slot = AddSlot({.payload = Payload::kKv, .span = Span::kSuper});
    if (!forward_) {
      home_gradient_ = AddSlot({.payload = Payload::kKvGrad, .home = true});
      attend_.kv_result = AddSlot({.payload = Payload::kKvGrad, .span = Span::kSuper});
    }
    Gather();
    AddAttend();
    if (!forward_) ReturnGradients();
    return std::move(plan_);
  }

 private:
  int Lower(int distance) const { return (me_ - distance + ranks_) % ranks_; }
  int Higher(int distance) const { return (me_ + distance) % ranks_; }
  int AddSlot(const SlotSpec& spec) {
    plan_.slots.push_back(spec);
    return static_cast<int>(plan_.slots.size()) - 1;
  }
  int Add(Step step) {
    plan_.steps.push_back(std::move(step));
    return static_cast<int>(plan_.steps.size()) - 1;
  }

  void Gather() {
    attend_.kv_rows = a_.RowsFor(me_, me_);
    for (const BlockRows& rows : attend_.kv_rows)
      Add({.kind = StepKind::kCopy, .slot = home_kv_, .into = attend_.kv_slot, .rows = rows});
    std::vector<int> before;
    for (int distance = 1; distance < ranks_; ++distance) {
      const int to = Lower(distance), from = Higher(distance);
      std::vector<int> sends;
      for (const BlockRows& rows : a_.RowsFor(me_, to)) {
        sends.push_back(Add({.kind = StepKind::kSend,
                             .slot = home_kv_,
                             .rows = rows,
                             .peer = to,
                             .message = a_.MessageOf(Payload::kKv, me_, to, rows),
                             .after = before}));
      }
      if (!sends.empty()) before = std::move(sends);
      for (const BlockRows& rows : a_.RowsFor(from, me_)) {
        attend_.kv_rows.push_back(rows);
        receives_.push_back(Add({.kind = StepKind::kReceive,
                                 .slot = attend_.kv_slot,
                                 .rows = rows,
                                 .peer = from,
                                 .message = a_.MessageOf(Payload::kKv, from, me_, rows)}));
      }
    }
  }

  void AddAttend() {
    const ExchangeProblem& problem = a_.problem;
    for (size_t q = 0; q < problem.chunks.size(); ++q) {
      if (problem.chunks[q].owner != me_) continue;
      for (size_t kv = 0; kv < problem.chunks.size(); ++kv) {
        if (problem.keys_of(q, kv).empty()) continue;
        attend_.pairs.push_back(
            {static_cast<int>(q), static_cast<int>(kv), problem.keys_of(q, kv), problem.pairs_of(q, kv)});
      }
    }
    attend_.q_write = attend_.kv_write = ResultWrite::kOverwrite;
    if (forward_) attend_.arrival = KeyArrival::kDuring, attend_.kv_write = ResultWrite::kAccumulate;
    if (problem.block_rows > 0) attend_.q_rows = {{me_, {0, problem.block_rows}}};
    computed_ = Add({.kind = StepKind::kAttend, .attend = attend_, .after = receives_});
  }

  void ReturnGradients() {
    for (const BlockRows& rows : a_.RowsFor(me_, me_))
      Add({.kind = StepKind::kReduce, .slot = attend_.kv_result, .into = home_gradient_, .rows = rows});
    std::vector<int> added;  // by distance: the last that reads its slot; others are before it
    std::vector<int> incoming;
    for (int distance = 1; distance < ranks_; ++distance) {
      const int to = Higher(distance), from = Lower(distance);
      for (const BlockRows& rows : a_.RowsFor(to, me_)) {
        Add({.kind = StepKind::kSend,
             .slot = attend_.kv_result,
             .rows = rows,
             .peer = to,
             .message = a_.MessageOf(Payload::kKvGrad, me_, to, rows),
             .after = {computed_}});
      }
      const std::vector<BlockRows>& back = a_.RowsFor(me_, from);
      if (back.empty()) continue;
      // One comes while the one before is added.
      constexpr size_t kIncoming = 2;
      std::vector<int> free;
      if (added.size() < kIncoming) {
        incoming.push_back(AddSlot({.payload = Payload::kKvGrad}));
      } else {
        free = {added[added.size() - kIncoming]};
      }
      const int slot = incoming[added.size() % kIncoming];
      std::vector<int> receives;
      for (const BlockRows& rows : back) {
        receives.push_back(Add({.kind = StepKind::kReceive,
                                .slot = slot,
                                .rows = rows,
                                .peer = from,
                                .message = a_.MessageOf(Payload::kKvGrad, from, me_, rows),
                                .after = free}));
      }
      int last = -1;
      for (size_t i = 0; i < back.size(); ++i) {
        last = Add({.kind = StepKind::kReduce,
                    .slot = slot,
                    .into = home_gradient_,
                    .rows = back[i],
                    .after = {receives[i]}});
      }
      added.push_back(last);
    }
  }

  Arenas& a_;
  const int me_;
  const bool forward_;
  const int ranks_;
  RankPlan plan_;
  Attend attend_;
  int home_kv_ = -1, home_gradient_ = -1, computed_ = -1;
  std::vector<int> receives_;
};

// By chunk: its row in the arena. Returns the arena's rows.
int64_t LayOut(const ExchangeProblem& problem, std::vector<int64_t>* rows) {
  std::map<std::pair<int64_t, size_t>, size_t> by_position;
  for (size_t k = 0; k < problem.chunks.size(); ++k) by_position[{problem.chunks[k].position, k}] = k;
  rows->resize(problem.chunks.size());
  int64_t next = 0;
  for (const auto& [position, k] : by_position) {
    (*rows)[k] = next;
    next += problem.chunks[k].rows.size();
  }
  return next;
}

}  // namespace

ExchangePlan BuildArena(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice) {
  ExchangePlan plan{.name = NameOf(choice, problem.ranks), .pass = pass, .problem = problem};
  HeadGroup all{.q_begin = 0, .q_end = problem.heads};
  for (int64_t head = 0; head < problem.kv_heads; ++head) all.kv_heads.push_back(head);
  plan.groups = {all};
  plan.super_size = LayOut(problem, &plan.super_rows);
  Arenas arenas(problem, pass);
  for (int r = 0; r < problem.ranks; ++r) plan.ranks.push_back(ArenaRank(&arenas, r).Build());
  return plan;
}

}  // namespace annulus
