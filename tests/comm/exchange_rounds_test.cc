// Plans on lanes that run strictly in order, as streams and NCCL communicators do: never a deadlock, and
// nothing before what it waits for.

#include <gtest/gtest.h>

#include <map>

#include "../../comm/exchange/rounds.h"
#include "comm/exchange_execute_checks.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;

using testing::kPasses;

using Launches = std::vector<std::vector<Launch>>;  // [rank]

// Streams that wait only where they must, or all of a rank's as one: hardware may have fewer queues.
enum class Queues { kOneALane, kOneARank };

// Runs launches on lanes in order. A launch starts when all before it on its lane has ended and every `after`
// of its steps has; computing ends then, transfers when the partners' launches with the same messages have
// started too. Empty if everything ends, else who is stuck.
std::string RunInOrder(const ExchangePlan& plan, const Launches& launches, Queues queues) {
  struct State {
    bool started = false, ended = false;
  };
  struct At {
    size_t rank, launch;
  };
  std::vector<std::vector<State>> states;
  std::map<int, std::vector<At>> ends_of;        // by message
  std::vector<std::vector<size_t>> launch_with;  // [rank][step]
  for (size_t r = 0; r < launches.size(); ++r) {
    states.emplace_back(launches[r].size());
    launch_with.emplace_back(plan.ranks[r].steps.size());
    for (size_t i = 0; i < launches[r].size(); ++i) {
      for (const int s : launches[r][i].steps) {
        launch_with[r][static_cast<size_t>(s)] = i;
        const Step& step = plan.ranks[r].steps[static_cast<size_t>(s)];
        if (step.peer >= 0) ends_of[step.message].push_back({r, i});
      }
    }
  }
  const auto may_start = [&](size_t r, size_t i) {
    for (size_t before = 0; before < i; ++before) {
      const bool same = queues == Queues::kOneARank || launches[r][before].lane == launches[r][i].lane;
      if (same && !states[r][before].ended) return false;
    }
    for (const int s : launches[r][i].steps) {
      for (const int before : plan.ranks[r].steps[static_cast<size_t>(s)].after) {
        if (!states[r][launch_with[r][static_cast<size_t>(before)]].ended) return false;
      }
    }
    return true;
  };
  const auto may_end = [&](size_t r, size_t i) {
    for (const int s : launches[r][i].steps) {
      const Step& step = plan.ranks[r].steps[static_cast<size_t>(s)];
      if (step.peer < 0) continue;
      for (const At& end : ends_of[step.message]) {
        if (!states[end.rank][end.launch].started) return false;
      }
    }
    return true;
  };
  // What may happen stays possible, so the order of this search does not matter.
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t r = 0; r < launches.size(); ++r) {
      for (size_t i = 0; i < launches[r].size(); ++i) {
        State& state = states[r][i];
        if (!state.started && may_start(r, i)) state.started = moved = true;
        if (state.started && !state.ended && may_end(r, i)) state.ended = moved = true;
      }
    }
  }
  for (size_t r = 0; r < launches.size(); ++r) {
    for (size_t i = 0; i < launches[r].size(); ++i) {
      if (!states[r][i].ended) return absl::StrCat("rank ", r, " is stuck in launch ", i);
    }
  }
  return "";
}

// Every step once; computing in the order of the list; dependencies enqueued before what waits for them,
// because an event must be recorded before a stream can wait for it; the messages from one rank to another on
// a lane in one order at both ends, because NCCL matches them by it.
std::string CheckForm(const ExchangePlan& plan, const Launches& launches) {
  std::map<std::tuple<ExchangeLane, size_t, size_t>, std::vector<int>> sent,
      received;  // (lane, from, to): messages
  for (size_t r = 0; r < launches.size(); ++r) {
    const std::vector<Step>& steps = plan.ranks[r].steps;
    std::vector<bool> enqueued(steps.size());
    int last_compute = -1;
    for (const Launch& launch : launches[r]) {
      for (const int s : launch.steps) {
        const Step& step = steps[static_cast<size_t>(s)];
        const std::string at = absl::StrCat("rank ", r, " step ", s);
        if (enqueued[static_cast<size_t>(s)]) return at + " is enqueued twice";
        for (const int before : step.after) {
          if (!enqueued[static_cast<size_t>(before)]) return at + " comes before what it waits for";
        }
        const bool compute = step.peer < 0;
        if (compute != (launch.lane == ExchangeLane::kCompute)) return at + " is on the wrong lane";
        if (compute && (launch.steps.size() != 1 || s < last_compute)) return at + " computes out of order";
        if (compute) last_compute = s;
        if (compute) continue;
        const size_t peer = static_cast<size_t>(step.peer);
        if (step.kind == StepKind::kSend) sent[{launch.lane, r, peer}].push_back(step.message);
        if (step.kind == StepKind::kReceive) received[{launch.lane, peer, r}].push_back(step.message);
      }
      for (const int s : launch.steps) enqueued[static_cast<size_t>(s)] = true;
    }
    if (std::find(enqueued.begin(), enqueued.end(), false) != enqueued.end())
      return absl::StrCat("rank ", r, ": a step is missing");
  }
  return sent == received ? "" : "messages are received in another order than that of their sends";
}

class InOrderLanes : public ::testing::TestWithParam<int> {};

TEST_P(InOrderLanes, NeverDeadlock) {
  const int ranks = GetParam();
  uint64_t seed = static_cast<uint64_t>(ranks);
  for (const PlanChoice& choice : testing::ManyChoices(ranks, 4)) {
    for (const Pass pass : kPasses) {
      const ExchangeCase made = testing::CaseFor(choice, ranks, seed += 100);
      SCOPED_TRACE(made.name + ", seed " + std::to_string(seed));
      const ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
      const Launches launches = LaunchesOf(plan);
      ASSERT_EQ(CheckForm(plan, launches), "") << ToString(plan);
      for (const Queues queues : {Queues::kOneALane, Queues::kOneARank}) {
        ASSERT_EQ(RunInOrder(plan, launches, queues), "") << ToString(plan);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, InOrderLanes, ::testing::Range(1, 17));

ExchangePlan FullMask(int ranks, Pass pass, const PlanChoice& choice = {}) {
  const testing::CaseCut cut{.parts = ChunkParts(choice)};
  const ExchangeCase made =
      ExchangeCaseMaker(1).Make(ranks, 4, 4 * ranks, CaseLayout::kContiguous, CaseMask::kFull, cut);
  return BuildPlan(made.problem, pass, choice).value();
}

bool MovesOperands(const Launch& launch) {
  return launch.lane == ExchangeLane::kOperandsLower || launch.lane == ExchangeLane::kOperandsHigher;
}

// In a full ring every hop hands on what the hop before brought, so two rounds that change places on one rank
// block the ring.
TEST(Rounds, SwappedOnOneRankDeadlock) {
  int swapped = 0;
  for (const int ranks : {3, 4, 7}) {
    for (const Pass pass : kPasses) {
      const ExchangePlan plan = FullMask(ranks, pass);
      const Launches right = LaunchesOf(plan);
      for (size_t r = 0; r < right.size(); ++r) {
        std::vector<size_t> kv;  // the launches of the lane
        for (size_t i = 0; i < right[r].size(); ++i) {
          if (MovesOperands(right[r][i])) kv.push_back(i);
        }
        ASSERT_EQ(kv.size(), static_cast<size_t>(ranks - 1));
        for (size_t i = 0; i + 1 < kv.size(); ++i) {
          Launches wrong = right;
          std::swap(wrong[r][kv[i]].steps, wrong[r][kv[i + 1]].steps);
          EXPECT_NE(RunInOrder(plan, wrong, Queues::kOneALane), "") << "rank " << r << ", round " << i;
          EXPECT_NE(CheckForm(plan, wrong), "") << "rank " << r << ", round " << i;
          ++swapped;
        }
      }
    }
  }
  EXPECT_EQ(swapped, 2 * (3 * 1 + 4 * 2 + 7 * 5));
}

// The transfers of a round one after the other: each rank would finish its send before it receives.
TEST(Rounds, SingleTransfersDeadlock) {
  for (const int ranks : {2, 3, 5}) {
    const ExchangePlan plan = FullMask(ranks, Pass::kForward);
    Launches single;
    for (const std::vector<Launch>& launches : LaunchesOf(plan)) {
      const std::vector<Step>& steps = plan.ranks[single.size()].steps;
      single.emplace_back();
      for (Launch launch : launches) {
        const auto sends = [&](int s) { return steps[static_cast<size_t>(s)].kind == StepKind::kSend; };
        std::stable_partition(launch.steps.begin(), launch.steps.end(), sends);
        for (const int s : launch.steps)
          single.back().push_back({.level = launch.level, .lane = launch.lane, .steps = {s}});
      }
    }
    EXPECT_EQ(RunInOrder(plan, LaunchesOf(plan), Queues::kOneALane), "") << ranks;
    EXPECT_NE(RunInOrder(plan, single, Queues::kOneALane), "") << ranks;
  }
}

// The round that brings the block of hop t + 1 is enqueued before the computing on that of hop t, also where
// results travel.
TEST(Rounds, OperandsAreEnqueuedAheadOfComputing) {
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kTokenRing}) {
    for (const Pass pass : kPasses) {
      const ExchangePlan plan = FullMask(8, pass, {.kind = kind});
      const Launches launches = LaunchesOf(plan);
      for (size_t r = 0; r < launches.size(); ++r) {
        int received = 0, attended = 0;  // blocks
        for (const Launch& launch : launches[r]) {
          const Step& step = plan.ranks[r].steps[static_cast<size_t>(launch.steps[0])];
          if (MovesOperands(launch)) ++received;
          if (step.kind != StepKind::kAttend) continue;
          EXPECT_GE(received, std::min(attended + 1, 7))
              << plan.name << ", rank " << r << ", attend " << attended;
          ++attended;
        }
        EXPECT_EQ(attended, 8);
        EXPECT_EQ(received, 7);
      }
    }
  }
}

// Each message is on the lane of its payload and of the shorter way round; between opposite ranks both are.
TEST(Rounds, LanesArePayloadsAndWays) {
  const ExchangePlan plan = FullMask(8, Pass::kForward, {.kind = PlanKind::kBidirectionalTokenRing});
  int64_t seen[kTransferLanes] = {};
  const Launches launches = LaunchesOf(plan);
  for (size_t r = 0; r < launches.size(); ++r) {
    for (const Launch& launch : launches[r]) {
      for (const int s : launch.steps) {
        const Step& step = plan.ranks[r].steps[static_cast<size_t>(s)];
        if (step.kind != StepKind::kSend) continue;
        const int hop = (step.peer - static_cast<int>(r) + 8) % 8;
        const bool higher =
            launch.lane == ExchangeLane::kOperandsHigher || launch.lane == ExchangeLane::kResultsHigher;
        EXPECT_EQ(higher, hop <= 4) << Name(launch.lane) << ", hop " << hop;
        const Payload payload = plan.ranks[r].slots[static_cast<size_t>(step.slot)].payload;
        EXPECT_EQ(payload == Payload::kQuery, MovesOperands(launch));
        ++seen[static_cast<size_t>(launch.lane)];
      }
    }
  }
  EXPECT_EQ(seen[0], 8 * 7);
  EXPECT_EQ(seen[1], 8 * 7);
  EXPECT_EQ(seen[2] + seen[3], 2 * 8 * 7);
}

}  // namespace
}  // namespace annulus
