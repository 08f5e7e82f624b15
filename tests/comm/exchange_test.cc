// Plans of all builders are valid and run to the right result; what identifies and describes a plan.

#include <gtest/gtest.h>

#include <ctime>
#include <map>
#include <set>

#include "annulus/comm/exchange_build.h"
#include "comm/plan_edits.h"
#include "comm/plan_judge.h"

namespace annulus {
namespace {

using testing::CaseCut;
using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::FieldEdit;

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

struct Heads {
  int64_t heads, kv_heads;
};
constexpr Heads kHeads[] = {{4, 4}, {4, 2}, {3, 1}, {6, 2}, {5, 5}, {2, 1}};

// What the kinds leave open.
PlanChoice Varied(PlanChoice choice, ExchangeCaseMaker* draw) {
  choice.direction = static_cast<RingDirection>(draw->Below(3));
  choice.parts = static_cast<int>(1 + draw->Below(2));
  choice.buffers = static_cast<int>(2 + draw->Below(2));
  choice.output_width = static_cast<Width>(draw->Below(2));
  return choice;
}

class AllPlans : public ::testing::TestWithParam<int> {};

TEST_P(AllPlans, AreValidForEveryMaskAndLayout) {
  const int ranks = GetParam();
  ExchangeCaseMaker maker(static_cast<uint64_t>(ranks));
  uint64_t seed = 0;
  for (const CaseLayout layout :
       {CaseLayout::kContiguous, CaseLayout::kZigzag, CaseLayout::kStriped, CaseLayout::kPieces}) {
    for (const CaseMask mask :
         {CaseMask::kCausal, CaseMask::kWindow, CaseMask::kDocuments, CaseMask::kFull, CaseMask::kSparse}) {
      const Heads heads = kHeads[maker.Below(std::size(kHeads))];
      // More groups than heads, too: some compute nothing.
      for (const PlanChoice& each : AllChoices(ranks, ranks)) {
        const PlanChoice choice = Varied(each, &maker);
        const int64_t rows = static_cast<int64_t>(2 + 2 * maker.Below(3));
        const int64_t tokens = ranks * rows - static_cast<int64_t>(maker.Below(static_cast<uint64_t>(rows)));
        const ExchangeCase made =
            maker.Make(ranks, rows, tokens, layout, mask,
                       {.parts = ChunkParts(choice), .heads = heads.heads, .kv_heads = heads.kv_heads});
        for (const Pass pass : kPasses) {
          SCOPED_TRACE(absl::StrCat(NameOf(choice, ranks), ", ", made.name));
          const absl::StatusOr<ExchangePlan> plan = BuildPlan(made.problem, pass, choice);
          ASSERT_EQ(plan.status(), absl::OkStatus());
          ASSERT_EQ(Validate(*plan), absl::OkStatus()) << ToString(*plan);
          ASSERT_FALSE(testing::HasRace(*plan)) << ToString(*plan);
          ASSERT_EQ(testing::RunInRandomOrder(made, *plan, seed++), "") << ToString(*plan);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, AllPlans, ::testing::Range(1, 9));

// A problem for `choice` with 8 rows a rank.
ExchangeCase ZigzagCausal(int ranks, const PlanChoice& choice, int64_t heads = 64, int64_t kv_heads = 8) {
  return ExchangeCaseMaker(4).Make(ranks, 8, ranks * 8, CaseLayout::kZigzag, CaseMask::kCausal,
                                   {.parts = ChunkParts(choice), .heads = heads, .kv_heads = kv_heads});
}
ExchangePlan Build(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice) {
  return BuildPlan(problem, pass, choice).value();
}

TEST(Validate, AcceptsAllPlansOfManyRanks) {
  for (const int ranks : {9, 12, 16}) {
    for (const PlanChoice& choice : AllChoices(ranks, 64)) {
      for (const Pass pass : kPasses) {
        const ExchangePlan plan = Build(ZigzagCausal(ranks, choice).problem, pass, choice);
        EXPECT_EQ(Validate(plan), absl::OkStatus());
      }
    }
  }
}

// Under a second of processor time for 64 ranks, whatever the kind. 5: sanitizers and builds for debugging.
TEST(Validate, IsQuick) {
  std::vector<PlanChoice> choices = {{.kind = PlanKind::kBidirectionalTokenRing, .head_split = 8}};
  for (int k = 0; k < kPlanKinds; ++k) choices.push_back({.kind = static_cast<PlanKind>(k), .inner = 4});
  for (const auto& [ranks, seconds] : {std::pair{16, 0.1}, std::pair{64, 1.0}}) {
    choices.push_back({.head_split = ranks});
    std::map<int, ExchangeProblem> problems;  // by parts of chunks
    for (const PlanChoice& choice : choices) {
      const int parts = ChunkParts(choice);
      if (problems.count(parts) == 0) problems[parts] = ZigzagCausal(ranks, choice).problem;
      for (const Pass pass : kPasses) {
        const ExchangePlan plan = Build(problems[parts], pass, choice);
        const std::clock_t begin = std::clock();
        EXPECT_EQ(Validate(plan), absl::OkStatus());
        const double took = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
        EXPECT_LT(took, 5 * seconds) << plan.name << ", " << ranks << " ranks";
      }
    }
  }
}

// More messages than an MPI tag can number.
TEST(Validate, AcceptsMoreMessagesThanTags) {
  const PlanChoice choice;
  const ExchangePlan plan = Build(ZigzagCausal(160, choice).problem, Pass::kBackward, choice);
  EXPECT_EQ(Validate(plan), absl::OkStatus());
  int messages = 0;
  for (const RankPlan& rank : plan.ranks) {
    for (const Step& step : rank.steps) messages += step.kind == StepKind::kSend ? 1 : 0;
  }
  EXPECT_GT(messages, 32767);
}

// Every field counts, down to the last one of the last rank.
TEST(Plan, HashTellsPlansApart) {
  for (const PlanChoice& choice : {PlanChoice{.kind = PlanKind::kTokenRing}, PlanChoice{.head_split = 2}}) {
    const ExchangeProblem problem = ZigzagCausal(4, choice, 4, 2).problem;
    for (const Pass pass : kPasses) {
      const ExchangePlan plan = Build(problem, pass, choice);
      EXPECT_EQ(HashOf(plan), HashOf(Build(problem, pass, choice)));
      std::set<uint64_t> hashes = {HashOf(plan)};
      ExchangePlan same = plan;
      const int64_t fields = FieldEdit::Apply(&same, -1, 1);
      EXPECT_GT(fields, 1000);
      for (int64_t field = 0; field < fields; ++field) {
        ExchangePlan edited = plan;
        std::string what;
        FieldEdit::Apply(&edited, field, 1, &what);
        const bool differs = what.empty() || hashes.insert(HashOf(edited)).second;
        EXPECT_TRUE(differs) << what;
      }
    }
  }
}

TEST(Plan, PrintsAsText) {
  const PlanChoice choice{.direction = RingDirection::kTowardLower};
  const ExchangePlan plan = Build(ZigzagCausal(2, choice, 1, 1).problem, Pass::kForward, choice);
  EXPECT_EQ(ToString(plan),
            "kv_ring toward lower ranks, forward, 2 ranks, blocks of 8 rows\n"
            "rank 0 slot  0  home query\n"
            "rank 0 slot  1  home kv\n"
            "rank 0 slot  2  home output\n"
            "rank 0 slot  3  kv\n"
            "rank 0 step  0  attend queries of block 0 rows [0, 8) in slot 0, keys of block 0 rows [0, 8) in "
            "slot 1, 36 pairs, output adds to slot 2\n"
            "rank 0 step  1  send kv of block 0 rows [0, 4) of slot 1 to rank 1, message 0\n"
            "rank 0 step  2  receive kv of block 1 rows [0, 8) into slot 3 from rank 1, message 1\n"
            "rank 0 step  3  attend queries of block 0 rows [4, 8) in slot 0, keys of block 1 rows [0, 8) in "
            "slot 3, 32 pairs, output adds to slot 2, after 2\n"
            "rank 1 slot  0  home query\n"
            "rank 1 slot  1  home kv\n"
            "rank 1 slot  2  home output\n"
            "rank 1 slot  3  kv\n"
            "rank 1 step  0  attend queries of block 1 rows [0, 8) in slot 0, keys of block 1 rows [0, 8) in "
            "slot 1, 36 pairs, output adds to slot 2\n"
            "rank 1 step  1  receive kv of block 0 rows [0, 4) into slot 3 from rank 0, message 0\n"
            "rank 1 step  2  send kv of block 1 rows [0, 8) of slot 1 to rank 0, message 1\n"
            "rank 1 step  3  attend queries of block 1 rows [0, 8) in slot 0, keys of block 0 rows [0, 4) in "
            "slot 3, 32 pairs, output adds to slot 2, after 1\n");
}

// What the first plan has none of.
TEST(Plan, PrintsHeadGroupsAndResults) {
  const PlanChoice choice{.head_split = 2};
  const std::string text = ToString(Build(ZigzagCausal(2, choice, 4, 1).problem, Pass::kBackward, choice));
  for (const char* line :
       {"group 1: query heads [2, 4) with kv heads 0\n", "home kv gradient\n",
        "query of group 0, super-block\n", "query gradient of group 1, super-block, rounded\n",
        "copy query of block 0 rows [0, 8) of slot 0 into slot ", "query gradient overwrites slot ",
        "kv gradient overwrites slot ", "add kv gradient of block 1 rows [4, 8) of slot "}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "in\n" << text;
  }
}

}  // namespace
}  // namespace annulus
