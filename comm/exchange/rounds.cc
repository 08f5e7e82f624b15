#include "rounds.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include "annulus/base/check.h"

namespace annulus {
namespace {

// Steps of all ranks, the ends of a message being one node, and what each must come before.
class Levels {
 public:
  explicit Levels(const ExchangePlan& plan) : plan_(plan) {
    AddNodes();
    AddEdges();
    Spread();
  }

  int Of(size_t cp_rank, size_t step) const { return level_[node_[cp_rank][step]]; }

 private:
  void AddNodes() {
    constexpr size_t kUnknown = std::numeric_limits<size_t>::max();
    std::vector<size_t> node_of_message;
    size_t nodes = 0;
    for (const RankPlan& rank : plan_.ranks) {
      std::vector<size_t>& of_rank = node_.emplace_back();
      of_rank.reserve(rank.steps.size());
      for (const Step& step : rank.steps) {
        if (!IsTransfer(step.kind)) {
          of_rank.push_back(nodes++);
          continue;
        }
        const auto message = static_cast<size_t>(step.message);
        if (message >= node_of_message.size()) node_of_message.resize(message + 1, kUnknown);
        if (node_of_message[message] == kUnknown) node_of_message[message] = nodes++;
        of_rank.push_back(node_of_message[message]);
      }
    }
    first_.resize(nodes + 1);
    waits_for_.resize(nodes);
    level_.resize(nodes);
  }

  // fn(from, to): nodes.
  template <typename Fn>
  void ForEachEdge(const Fn& fn) const {
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      const std::vector<Step>& steps = plan_.ranks[r].steps;
      int last_compute = -1;
      for (size_t s = 0; s < steps.size(); ++s) {
        const auto add = [&](int from) { fn(node_[r][static_cast<size_t>(from)], node_[r][s]); };
        for (const int dependency : steps[s].after) add(dependency);
        if (!IsCompute(steps[s].kind)) continue;
        if (last_compute >= 0) add(last_compute);
        last_compute = static_cast<int>(s);
      }
    }
  }

  void AddEdges() {
    ForEachEdge([&](size_t from, size_t to) {
      ++first_[from + 1];
      ++waits_for_[to];
    });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    before_.resize(first_.back());
    std::vector<size_t> next(first_.begin(), first_.end() - 1);
    ForEachEdge([&](size_t from, size_t to) { before_[next[from]++] = to; });
  }

  void Spread() {
    std::vector<size_t> ready;
    ready.reserve(level_.size());
    for (size_t node = 0; node < level_.size(); ++node) {
      if (waits_for_[node] == 0) ready.push_back(node);
    }
    for (size_t i = 0; i < ready.size(); ++i) {
      const int level = level_[ready[i]] + 1;
      for (size_t edge = first_[ready[i]]; edge < first_[ready[i] + 1]; ++edge) {
        const size_t next = before_[edge];
        level_[next] = std::max(level_[next], level);
        if (--waits_for_[next] == 0) ready.push_back(next);
      }
    }
    ANNULUS_CHECK(ready.size() == level_.size()) << plan_.name << ": steps wait for each other in a circle";
  }

  const ExchangePlan& plan_;
  std::vector<std::vector<size_t>> node_;  // [rank][step]
  std::vector<size_t> first_;              // by node, of before_
  std::vector<size_t> before_;             // nodes that come behind it
  std::vector<int> waits_for_, level_;     // by node
};

std::vector<Launch> LaunchesOfRank(const ExchangePlan& plan, const Levels& levels, size_t cp_rank) {
  const RankPlan& rank = plan.ranks[cp_rank];
  std::vector<std::tuple<int, ExchangeLane, int, int>> places;  // level, lane, peer, step
  places.reserve(rank.steps.size());
  for (size_t s = 0; s < rank.steps.size(); ++s) {
    const Step& step = rank.steps[s];
    places.emplace_back(levels.Of(cp_rank, s), LaneOf(plan, static_cast<int>(cp_rank), step), step.peer,
                        static_cast<int>(s));
  }
  std::sort(places.begin(), places.end());
  std::vector<Launch> launches;
  for (const auto& [level, lane, peer, step] : places) {
    if (launches.empty() || launches.back().level != level || launches.back().lane != lane)
      launches.push_back({.level = level, .lane = lane, .steps = {}});
    launches.back().steps.push_back(step);
  }
  return launches;
}

}  // namespace

const char* Name(ExchangeLane lane) {
  switch (lane) {
    case ExchangeLane::kOperandsLower:
      return "operands toward lower ranks";
    case ExchangeLane::kOperandsHigher:
      return "operands toward higher ranks";
    case ExchangeLane::kResultsLower:
      return "results toward lower ranks";
    case ExchangeLane::kResultsHigher:
      return "results toward higher ranks";
    case ExchangeLane::kCompute:
      return "compute";
  }
  return "";
}

ExchangeLane LaneOf(const ExchangePlan& plan, int cp_rank, const Step& step) {
  if (IsCompute(step.kind)) return ExchangeLane::kCompute;
  const int ranks = static_cast<int>(plan.ranks.size());
  const int ahead = step.kind == StepKind::kSend ? step.peer - cp_rank : cp_rank - step.peer;
  const bool higher = (ahead + ranks) % ranks <= ranks / 2;
  const SlotSpec& slot = plan.ranks[static_cast<size_t>(cp_rank)].slots[static_cast<size_t>(step.slot)];
  if (IsResult(slot.payload)) return higher ? ExchangeLane::kResultsHigher : ExchangeLane::kResultsLower;
  return higher ? ExchangeLane::kOperandsHigher : ExchangeLane::kOperandsLower;
}

std::vector<std::vector<Launch>> LaunchesOf(const ExchangePlan& plan) {
  const Levels levels(plan);
  std::vector<std::vector<Launch>> launches;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    launches.push_back(LaunchesOfRank(plan, levels, r));
  }
  return launches;
}

}  // namespace annulus
