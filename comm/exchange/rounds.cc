#include "rounds.h"

#include <algorithm>
#include <map>

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
    std::map<int, size_t> messages;
    size_t nodes = 0;
    for (const RankPlan& rank : plan_.ranks) {
      node_.emplace_back();
      for (const Step& step : rank.steps) {
        const bool known = IsTransfer(step.kind) && !messages.try_emplace(step.message, nodes).second;
        node_.back().push_back(known ? messages[step.message] : nodes++);
      }
    }
    before_.resize(nodes);
    waits_for_.resize(nodes);
    level_.resize(nodes);
  }

  void AddEdges() {
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      const std::vector<Step>& steps = plan_.ranks[r].steps;
      int last_compute = -1;
      for (size_t s = 0; s < steps.size(); ++s) {
        const auto add = [&](int from) {
          before_[node_[r][static_cast<size_t>(from)]].push_back(node_[r][s]);
          ++waits_for_[node_[r][s]];
        };
        for (const int dependency : steps[s].after) add(dependency);
        if (!IsCompute(steps[s].kind)) continue;
        if (last_compute >= 0) add(last_compute);
        last_compute = static_cast<int>(s);
      }
    }
  }

  void Spread() {
    std::vector<size_t> ready;
    for (size_t node = 0; node < level_.size(); ++node) {
      if (waits_for_[node] == 0) ready.push_back(node);
    }
    for (size_t i = 0; i < ready.size(); ++i) {
      for (const size_t next : before_[ready[i]]) {
        level_[next] = std::max(level_[next], level_[ready[i]] + 1);
        if (--waits_for_[next] == 0) ready.push_back(next);
      }
    }
    ANNULUS_CHECK(ready.size() == level_.size()) << plan_.name << ": steps wait for each other in a circle";
  }

  const ExchangePlan& plan_;
  std::vector<std::vector<size_t>> node_;    // [rank][step]
  std::vector<std::vector<size_t>> before_;  // by node
  std::vector<int> waits_for_, level_;       // by node
};

std::vector<Launch> LaunchesOfRank(const ExchangePlan& plan, const Levels& levels, size_t cp_rank) {
  const RankPlan& rank = plan.ranks[cp_rank];
  std::map<std::pair<int, ExchangeLane>, std::vector<int>> found;
  for (size_t s = 0; s < rank.steps.size(); ++s) {
    const ExchangeLane lane = LaneOf(plan, static_cast<int>(cp_rank), rank.steps[s]);
    found[{levels.Of(cp_rank, s), lane}].push_back(static_cast<int>(s));
  }
  std::vector<Launch> launches;
  for (auto& [key, steps] : found) {
    std::stable_sort(steps.begin(), steps.end(), [&](int a, int b) {
      return rank.steps[static_cast<size_t>(a)].peer < rank.steps[static_cast<size_t>(b)].peer;
    });
    launches.push_back({.level = key.first, .lane = key.second, .steps = std::move(steps)});
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
