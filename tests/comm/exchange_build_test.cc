// What the builders move, keep and refuse, by the formulas of the schemes.

#include "annulus/comm/exchange_build.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "exchange_cases.h"

namespace annulus {
namespace {

using testing::CaseCut;
using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCaseMaker;

constexpr int64_t kRows = 64;  // of a block

ExchangeProblem CausalZigzag(int ranks, const PlanChoice& choice, int64_t heads = 8, int64_t kv_heads = 8) {
  const CaseCut cut{.parts = ChunkParts(choice), .heads = heads, .kv_heads = kv_heads};
  return ExchangeCaseMaker(1)
      .Make(ranks, kRows, ranks * kRows, CaseLayout::kZigzag, CaseMask::kCausal, cut)
      .problem;
}

ExchangePlan Build(int ranks, Pass pass, const PlanChoice& choice) {
  absl::StatusOr<ExchangePlan> plan = BuildPlan(CausalZigzag(ranks, choice), pass, choice);
  EXPECT_EQ(plan.status(), absl::OkStatus());
  return *std::move(plan);
}

// Rows of a payload that all ranks send, in blocks a rank.
double BlocksSent(const ExchangePlan& plan, Payload payload) {
  int64_t rows = 0;
  for (int r = 0; r < plan.problem.ranks; ++r) rows += RowsSent(plan, r)[static_cast<size_t>(payload)];
  return static_cast<double>(rows) / static_cast<double>(kRows * plan.problem.ranks);
}

size_t MostSlots(const ExchangePlan& plan) {
  size_t most = 0;
  for (const RankPlan& rank : plan.ranks) most = std::max(most, rank.slots.size());
  return most;
}

TEST(ExchangeBuildTest, CausalZigzagMovesThreeQuarters) {
  for (const int ranks : {2, 3, 4, 8, 16}) {
    const double expected = 0.75 * (ranks - 1);
    for (const PlanKind kind :
         {PlanKind::kKvRing, PlanKind::kDirectCast, PlanKind::kAllGather, PlanKind::kArena}) {
      const PlanChoice choice{.kind = kind};
      EXPECT_DOUBLE_EQ(BlocksSent(Build(ranks, Pass::kForward, choice), Payload::kKv), expected);
      const ExchangePlan backward = Build(ranks, Pass::kBackward, choice);
      EXPECT_DOUBLE_EQ(BlocksSent(backward, Payload::kKv), expected) << backward.name;
      EXPECT_DOUBLE_EQ(BlocksSent(backward, Payload::kKvGrad), expected) << backward.name;
    }
    const ExchangePlan token = Build(ranks, Pass::kForward, {.kind = PlanKind::kTokenRing});
    EXPECT_DOUBLE_EQ(BlocksSent(token, Payload::kQuery), expected);
    EXPECT_DOUBLE_EQ(BlocksSent(token, Payload::kOutput), expected);
    EXPECT_EQ(BlocksSent(token, Payload::kKv), 0);
    const ExchangePlan back = Build(ranks, Pass::kBackward, {.kind = PlanKind::kTokenRing});
    EXPECT_DOUBLE_EQ(BlocksSent(back, Payload::kQuery), expected);
    EXPECT_DOUBLE_EQ(BlocksSent(back, Payload::kQueryGrad), expected);
  }
}

TEST(ExchangeBuildTest, TheOtherDirectionMovesMore) {
  const ExchangePlan higher =
      Build(8, Pass::kForward, {.kind = PlanKind::kKvRing, .direction = RingDirection::kTowardHigher});
  EXPECT_GT(BlocksSent(higher, Payload::kKv), 0.75 * 7);
  EXPECT_LT(BlocksSent(higher, Payload::kKv), 7);
}

// Each operand and result of a head group goes to each other member of the group once.
TEST(ExchangeBuildTest, UlyssesMovesEachHeadOnce) {
  for (const int ranks : {2, 4, 8}) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const ExchangePlan plan = Build(ranks, pass, {.head_split = ranks});
      for (const Payload payload :
           {Payload::kQuery, Payload::kKv, pass == Pass::kForward ? Payload::kOutput : Payload::kQueryGrad})
        EXPECT_DOUBLE_EQ(BlocksSent(plan, payload), ranks - 1);
    }
  }
}

TEST(ExchangeBuildTest, AMeshGathersRowsAndColumns) {
  const ExchangePlan plan = Build(8, Pass::kForward, {.kind = PlanKind::kMesh, .inner = 4});
  EXPECT_LE(BlocksSent(plan, Payload::kQuery), 3);
  EXPECT_LE(BlocksSent(plan, Payload::kKv), 1);
  EXPECT_DOUBLE_EQ(BlocksSent(plan, Payload::kQuery), BlocksSent(plan, Payload::kOutput));
}

// Between two nodes a double ring sends each block once, the ring of all ranks as often as it passes.
TEST(ExchangeBuildTest, ADoubleRingCrossesBetweenNodesOnce) {
  constexpr int kInner = 4, kRanks = 8;
  const auto crossing = [](const ExchangePlan& plan) {
    int64_t rows = 0;
    for (int r = 0; r < kRanks; ++r) {
      for (const Step& step : plan.ranks[static_cast<size_t>(r)].steps) {
        if (step.kind == StepKind::kSend && step.peer / kInner != r / kInner) rows += step.rows.rows.size();
      }
    }
    return rows;
  };
  const ExchangePlan plan = Build(kRanks, Pass::kForward, {.kind = PlanKind::kDoubleRing, .inner = kInner});
  EXPECT_LE(crossing(plan), kRanks * kRows);
  EXPECT_LT(crossing(plan), crossing(Build(kRanks, Pass::kForward, {.kind = PlanKind::kDirectCast})));
}

TEST(ExchangeBuildTest, MemoryOfRingsDoesNotGrowWithTheRanks) {
  for (const PlanKind kind :
       {PlanKind::kKvRing, PlanKind::kBidirectionalKvRing, PlanKind::kDirectCast, PlanKind::kTokenRing,
        PlanKind::kBidirectionalTokenRing, PlanKind::kDoubleRing}) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const size_t slots = MostSlots(Build(12, pass, {.kind = kind, .inner = 4}));
      for (const int ranks : {16, 32}) {  // three nodes of four at least
        const ExchangePlan plan = Build(ranks, pass, {.kind = kind, .inner = 4});
        EXPECT_EQ(MostSlots(plan), slots) << plan.name << ", " << ranks << " ranks";
      }
    }
  }
}

int64_t WorkOf(const ExchangePlan& plan, int cp_rank) {
  int64_t pairs = 0;
  for (const Step& step : plan.ranks[static_cast<size_t>(cp_rank)].steps) {
    for (const BlockPair& pair : step.attend.pairs) pairs += pair.pairs;
  }
  return pairs;
}

// Contiguous causal blocks: rank r has r + 1 pairs of blocks of its own.
TEST(ExchangeBuildTest, BalancedEvensOutContiguousCausalWork) {
  for (const int ranks : {2, 3, 4, 8, 16}) {
    const ExchangeProblem problem =
        ExchangeCaseMaker(1)
            .Make(ranks, kRows, ranks * kRows, CaseLayout::kContiguous, CaseMask::kCausal)
            .problem;
    const absl::StatusOr<ExchangePlan> plan =
        BuildPlan(problem, Pass::kForward, {.kind = PlanKind::kBalanced});
    ASSERT_EQ(plan.status(), absl::OkStatus());
    int64_t most = 0, all = 0;
    for (int r = 0; r < ranks; ++r) {
      most = std::max(most, WorkOf(*plan, r));
      all += WorkOf(*plan, r);
    }
    // One block pair more than the mean at most: pairs are not cut.
    EXPECT_LE(most, all / ranks + kRows * kRows) << ranks;
  }
}

// Documents that lie within one rank's rows move nothing.
TEST(ExchangeBuildTest, DocumentsMoveOnlyWhatIsNeeded) {
  ExchangeProblem problem;
  problem.ranks = 4;
  problem.block_rows = 8;
  for (int r = 0; r < 4; ++r) problem.chunks.push_back({r, {0, 8}, r * 8});
  problem.keys.resize(16);
  problem.pairs.resize(16);
  for (size_t r = 0; r < 4; ++r) problem.keys[r * 4 + r] = {0, 8}, problem.pairs[r * 4 + r] = 36;
  // One document reaches from the last 3 rows of rank 1 into rank 2.
  problem.keys[2 * 4 + 1] = {5, 8}, problem.pairs[2 * 4 + 1] = 6;
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kDirectCast, PlanKind::kBidirectionalKvRing}) {
    const absl::StatusOr<ExchangePlan> plan = BuildPlan(problem, Pass::kForward, {.kind = kind});
    ASSERT_EQ(plan.status(), absl::OkStatus());
    int64_t rows = 0;
    for (int r = 0; r < 4; ++r) rows += RowsSent(*plan, r)[static_cast<size_t>(Payload::kKv)];
    EXPECT_EQ(rows, 3) << plan->name;
  }
}

TEST(ExchangeBuildTest, AnyHeadsCanBeSplit) {
  for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{5, 5}, {12, 4}, {6, 1}, {2, 2}}) {
    const PlanChoice choice{.head_split = 4};
    const absl::StatusOr<ExchangePlan> plan =
        BuildPlan(CausalZigzag(4, choice, heads, kv_heads), Pass::kBackward, choice);
    ASSERT_EQ(plan.status(), absl::OkStatus());
    int64_t next = 0;
    for (const HeadGroup& group : plan->groups) {
      EXPECT_EQ(group.q_begin, next);
      next = group.q_end;
      EXPECT_LE(group.q_heads(), heads / 4 + 1);
      if (group.q_heads() == 0) continue;
      EXPECT_EQ(group.q_heads() % static_cast<int64_t>(group.kv_heads.size()), 0);
    }
    EXPECT_EQ(next, heads);
  }
}

// Forward one step of a rank computes on one buffer, begins with what the rank has and takes the rest as it
// comes, from one peer after the other.
TEST(ExchangeBuildTest, ArenaComputesOnOneBufferInOneStep) {
  for (const int ranks : {2, 3, 8}) {
    for (const int parts : {1, 2}) {
      const ExchangePlan plan = Build(ranks, Pass::kForward, {.kind = PlanKind::kArena, .parts = parts});
      EXPECT_EQ(plan.super_size, ranks * kRows);
      for (const RankPlan& rank : plan.ranks) {
        ASSERT_EQ(rank.slots.size(), 4u) << "queries, keys and values, output; the arena";
        const Step& attend = rank.steps.back();
        ASSERT_EQ(attend.kind, StepKind::kAttend);
        EXPECT_EQ(rank.slots[static_cast<size_t>(attend.attend.kv_slot)].span, Span::kSuper);
        size_t receives = 0, copies = 0;
        int last_peer = -1;
        std::vector<int> last;  // sends to the peer before
        std::vector<int> sends;
        for (size_t s = 0; s + 1 < rank.steps.size(); ++s) {
          const Step& step = rank.steps[s];
          copies += step.kind == StepKind::kCopy;
          if (step.kind == StepKind::kReceive) {
            ++receives;
            EXPECT_TRUE(ArrivesDuring(rank, attend, static_cast<int>(s)));
            EXPECT_TRUE(step.after.empty()) << "its rows are used once";
          }
          if (step.kind != StepKind::kSend) continue;
          if (step.peer != last_peer) last = std::exchange(sends, {});
          last_peer = step.peer;
          sends.push_back(static_cast<int>(s));
          EXPECT_EQ(step.after, last);
        }
        EXPECT_EQ(attend.after.size(), receives);
        EXPECT_GE(receives, static_cast<size_t>(ranks - 1));
        EXPECT_EQ(copies, static_cast<size_t>(2 * parts)) << "own rows";
      }
    }
  }
}

TEST(ExchangeBuildTest, KeysComeDuringForwardStepsOnly) {
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    ExchangePlan plan = Build(3, pass, {.kind = PlanKind::kArena});
    EXPECT_EQ(Validate(plan), absl::OkStatus());
    for (Step& step : plan.ranks[1].steps) {
      if (step.kind != StepKind::kAttend) continue;
      step.attend.arrival = KeyArrival::kDuring;
      if (pass == Pass::kForward) step.attend.kv_slot = 1;  // at home
    }
    const absl::Status refused = Validate(plan);
    EXPECT_TRUE(absl::StrContains(refused.message(), "takes keys as they come: expected a forward plan"))
        << refused;
  }
}

void ExpectRefused(const PlanChoice& choice, const char* words) {
  const absl::StatusOr<ExchangePlan> plan = BuildPlan(CausalZigzag(6, {}), Pass::kForward, choice);
  ASSERT_FALSE(plan.ok()) << words;
  EXPECT_TRUE(absl::IsInvalidArgument(plan.status()));
  EXPECT_TRUE(absl::StrContains(plan.status().message(), words)) << plan.status();
}

TEST(ExchangeBuildTest, RefusesTheImpossibleOnly) {
  ExpectRefused({.head_split = 4}, "head_split=4: expected a divisor of the 6 ranks");
  ExpectRefused({.head_split = 0}, "head_split=0");
  ExpectRefused({.kind = PlanKind::kMesh, .inner = 4}, "inner=4: expected a divisor of the 6 places");
  ExpectRefused({.kind = PlanKind::kDoubleRing, .head_split = 2, .inner = 2}, "divisor of the 3 places");
  ExpectRefused({.kind = PlanKind::kArena, .head_split = 2}, "head_split=2: expected 1 for an arena");
  ExpectRefused({.buffers = 1}, "buffers=1: expected at least 2");
  ExpectRefused({.parts = 0}, "parts=0: expected at least 1");
}

TEST(ExchangeBuildTest, AllChoicesAreDifferentAndNamed) {
  for (const int ranks : {1, 2, 4, 6, 8, 12}) {
    std::vector<std::string> names;
    for (const PlanChoice& choice : AllChoices(ranks, 8)) {
      const absl::StatusOr<ExchangePlan> plan =
          BuildPlan(CausalZigzag(ranks, choice), Pass::kForward, choice);
      ASSERT_EQ(plan.status(), absl::OkStatus());
      names.push_back(NameOf(choice, ranks));
    }
    std::sort(names.begin(), names.end());
    EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end()) << ranks;
  }
}

}  // namespace
}  // namespace annulus
