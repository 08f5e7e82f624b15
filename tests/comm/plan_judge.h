#pragma once

// A judge of plans that shares no code with Validate: it runs them with toy attention in random orders, and
// looks for steps that may race row by row.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "comm/toy_rank.h"

namespace annulus::testing {

// Runs all ranks of a plan in one thread, each time taking a random one of the steps that may run, a send
// together with its receive.
class RandomRun {
 public:
  RandomRun(const ExchangeCase& exchange_case, const ExchangePlan& plan, uint64_t seed)
      : plan_(plan), random_(seed, "order") {
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      ranks_.emplace_back(exchange_case, plan, static_cast<int>(r));
      done_.emplace_back(plan.ranks[r].steps.size());
    }
  }

  // Empty if it ends with the right results, else what is wrong.
  std::string Run() {
    for (uint64_t draw = 0;; ++draw) {
      const std::vector<Choice> choices = Choices();
      if (choices.empty()) break;
      Take(choices[random_.Below(draw, choices.size())]);
    }
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const auto stuck = std::find(done_[r].begin(), done_[r].end(), false);
      if (stuck != done_[r].end())
        return absl::StrCat("rank ", r, " is stuck at step ", stuck - done_[r].begin());
      if (std::string wrong = ranks_[r].Compare(); !wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  struct Choice {
    size_t rank, step, to_rank, to_step;  // a message: both ends; else `to` is the step itself
  };

  const std::vector<Step>& StepsOf(size_t r) const { return plan_.ranks[r].steps; }
  bool Computes(const Step& step) const {
    return step.kind == StepKind::kAttend || step.kind == StepKind::kCopy || step.kind == StepKind::kReduce;
  }
  bool Free(size_t r, size_t s) const {
    if (done_[r][s]) return false;
    for (const int before : StepsOf(r)[s].after) {
      if (!done_[r][static_cast<size_t>(before)]) return false;
    }
    return true;
  }
  std::optional<size_t> ReceiveOf(size_t r, const Step& send) const {
    const size_t to = static_cast<size_t>(send.peer);
    for (size_t t = 0; t < StepsOf(to).size(); ++t) {
      const Step& receive = StepsOf(to)[t];
      const bool match = receive.kind == StepKind::kReceive && receive.peer == static_cast<int>(r) &&
                         receive.message == send.message && receive.rows.rows.size() == send.rows.rows.size();
      if (match && Free(to, t)) return t;
    }
    return std::nullopt;
  }

  std::vector<Choice> Choices() const {
    std::vector<Choice> choices;
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      bool computed_all_before = true;
      for (size_t s = 0; s < StepsOf(r).size(); ++s) {
        const Step& step = StepsOf(r)[s];
        if (Computes(step)) {
          if (computed_all_before && Free(r, s)) choices.push_back({r, s, r, s});
          computed_all_before = computed_all_before && done_[r][s];
        } else if (step.kind == StepKind::kSend && Free(r, s)) {
          const std::optional<size_t> receive = ReceiveOf(r, step);
          if (receive.has_value()) choices.push_back({r, s, static_cast<size_t>(step.peer), *receive});
        }
      }
    }
    return choices;
  }

  void Take(const Choice& choice) {
    const Step& step = StepsOf(choice.rank)[choice.step];
    done_[choice.rank][choice.step] = done_[choice.to_rank][choice.to_step] = true;
    if (Computes(step)) {
      ranks_[choice.rank].Compute(step);
    } else {
      const Step& receive = StepsOf(choice.to_rank)[choice.to_step];
      ranks_[choice.to_rank].Receive(receive, ranks_[choice.rank], step);
    }
  }

  const ExchangePlan& plan_;
  const RandomStream random_;
  std::vector<ToyRank> ranks_;
  std::vector<std::vector<bool>> done_;
};

inline std::string RunInRandomOrder(const ExchangeCase& exchange_case, const ExchangePlan& plan,
                                    uint64_t seed) {
  return RandomRun(exchange_case, plan, seed).Run();
}

// Finds steps of one rank that may run together and touch one row of a slot, at least one writing it.
class RaceSearch {
 public:
  RaceSearch(const ExchangePlan& plan, const RankPlan& rank) : plan_(plan), rank_(rank) {
    for (const SlotSpec& spec : rank.slots) {
      first_.push_back(rows_);
      rows_ += static_cast<size_t>(spec.span == Span::kBlock ? plan.problem.block_rows : plan.super_size);
    }
    for (const Step& step : rank.steps) Mark(step);
    Connect();
  }

  bool Found() const {
    const size_t count = rank_.steps.size();
    for (size_t s = 0; s < count; ++s) {
      std::vector<bool> reached(count);
      Visit(s, &reached);
      for (size_t t = s + 1; t < count; ++t) {
        if (!reached[t] &&
            (Meet(writes_[s], writes_[t]) || Meet(writes_[s], reads_[t]) || Meet(reads_[s], writes_[t])))
          return true;
      }
    }
    return false;
  }

 private:
  using Rows = std::vector<uint64_t>;  // a bit each

  static bool Meet(const Rows& a, const Rows& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      if ((a[i] & b[i]) != 0) return true;
    }
    return false;
  }
  void Visit(size_t from, std::vector<bool>* reached) const {
    for (const size_t to : next_[from]) {
      if (!(*reached)[to]) (*reached)[to] = true, Visit(to, reached);
    }
  }

  void MarkRows(int slot, const BlockRows& rows, Rows* marks) const {
    const size_t first = first_[static_cast<size_t>(slot)];
    for (int64_t i = rows.rows.begin; i < rows.rows.end; ++i) {
      int64_t place = i;
      if (rank_.slots[static_cast<size_t>(slot)].span == Span::kSuper) {
        for (size_t c = 0; c < plan_.problem.chunks.size(); ++c) {
          const Chunk& chunk = plan_.problem.chunks[c];
          if (chunk.owner == rows.block && chunk.rows.begin <= i && i < chunk.rows.end)
            place = plan_.super_rows[c] + i - chunk.rows.begin;
        }
      }
      const size_t row = first + static_cast<size_t>(place);
      (*marks)[row / 64] |= uint64_t{1} << (row % 64);
    }
  }
  void Mark(const Step& step) {
    Rows& reads = reads_.emplace_back((rows_ + 63) / 64);
    Rows& writes = writes_.emplace_back((rows_ + 63) / 64);
    if (step.kind != StepKind::kAttend) {
      MarkRows(step.slot, step.rows, step.kind == StepKind::kReceive ? &writes : &reads);
      if (step.kind == StepKind::kCopy || step.kind == StepKind::kReduce)
        MarkRows(step.into, step.rows, &writes);
      return;
    }
    const Attend& attend = step.attend;
    for (const BlockPair& pair : attend.pairs) {
      const Chunk& queries = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)];
      MarkRows(attend.q_slot, {queries.owner, queries.rows}, &reads);
      const int kv_block = plan_.problem.chunks[static_cast<size_t>(pair.kv_chunk)].owner;
      MarkRows(attend.kv_slot, {kv_block, pair.keys}, &reads);
    }
    for (const BlockRows& rows : attend.q_rows) MarkRows(attend.q_result, rows, &writes);
    for (const BlockRows& rows : attend.kv_rows) {
      if (plan_.pass == Pass::kBackward) MarkRows(attend.kv_result, rows, &writes);
    }
  }
  void Connect() {
    next_.resize(rank_.steps.size());
    std::optional<size_t> computed;
    for (size_t s = 0; s < rank_.steps.size(); ++s) {
      const Step& step = rank_.steps[s];
      for (const int before : step.after) next_[static_cast<size_t>(before)].push_back(s);
      if (step.kind == StepKind::kSend || step.kind == StepKind::kReceive) continue;
      if (computed.has_value()) next_[*computed].push_back(s);
      computed = s;
    }
  }

  const ExchangePlan& plan_;
  const RankPlan& rank_;
  std::vector<size_t> first_;  // by slot: its first row among those of all slots
  size_t rows_ = 0;
  std::vector<Rows> reads_, writes_;       // by step
  std::vector<std::vector<size_t>> next_;  // by step
};

inline bool HasRace(const ExchangePlan& plan) {
  for (const RankPlan& rank : plan.ranks) {
    if (RaceSearch(plan, rank).Found()) return true;
  }
  return false;
}

}  // namespace annulus::testing
