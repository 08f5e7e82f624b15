// Plans made by hand that are refused, each for one reason, and problems that no plan may have.

#include <gtest/gtest.h>

#include "comm/exchange_cases.h"
#include "comm/plan_edits.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::InsertStep;
using testing::RemoveStep;

ExchangePlan TwoRanks(ExchangeCase* made) {
  *made = ExchangeCaseMaker(1).Make(2, 4, 8, CaseLayout::kContiguous, CaseMask::kFull);
  return BuildKvRing(made->problem, Pass::kForward);
}

// Each rank sends only after it has computed on what the other sends.
TEST(Deadlock, IsRefused) {
  ExchangeCase made;
  ExchangePlan plan = TwoRanks(&made);
  for (size_t r = 0; r < 2; ++r) {
    std::vector<Step>& steps = plan.ranks[r].steps;
    const auto send = std::find_if(steps.begin(), steps.end(),
                                   [](const Step& step) { return step.kind == StepKind::kSend; });
    Step moved = *send;
    RemoveStep(&plan, {r, static_cast<size_t>(send - steps.begin())});
    moved.after = {static_cast<int>(steps.size()) - 1};
    steps.push_back(moved);
  }
  EXPECT_NE(testing::RunInRandomOrder(made, plan, 1).find("stuck"), std::string::npos);
  const absl::Status status = Validate(plan);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("ranks wait for each other"), absl::string_view::npos) << status;
}

// Transports without tags match messages of a pair of ranks by their order.
TEST(MessageOrder, OfBothEndsMustAgree) {
  ExchangeCase made;
  const ExchangePlan plan = TwoRanks(&made);
  // Message 0 in two halves, received in this order or the other.
  for (const bool swap : {false, true}) {
    ExchangePlan split = plan;
    for (size_t r = 0; r < 2; ++r) {
      std::vector<Step>& steps = split.ranks[r].steps;
      const auto whole =
          std::find_if(steps.begin(), steps.end(), [](const Step& step) { return step.message == 0; });
      const size_t at = static_cast<size_t>(whole - steps.begin());
      Step half = *whole;
      half.rows = {0, 2};
      half.message = 7;
      whole->rows = {2, 4};
      const bool receives = whole->kind == StepKind::kReceive;
      InsertStep(&split, {r, at + (swap && receives ? 1 : 0)}, half);
      for (Step& step : split.ranks[r].steps) {
        if (receives && step.kind == StepKind::kAttend && !step.after.empty())
          step.after = {static_cast<int>(at), static_cast<int>(at) + 1};
      }
    }
    const absl::Status status = Validate(split);
    EXPECT_EQ(testing::RunInRandomOrder(made, split, 1), "");
    EXPECT_EQ(status.ok(), !swap) << status << ToString(split);
    const bool names_order = status.message().find("in another order") != absl::string_view::npos;
    EXPECT_EQ(names_order, swap) << status;
  }
}

TEST(Problem, MustBeWellFormed) {
  ExchangeCase made;
  const ExchangePlan plan = TwoRanks(&made);
  using Change = std::function<void(ExchangeProblem&)>;
  std::vector<Change> changes;
  changes.push_back([](ExchangeProblem& p) { p.ranks = 3; });
  changes.push_back([](ExchangeProblem& p) { p.block_rows = 5; });
  changes.push_back([](ExchangeProblem& p) { p.chunks[1].owner = 0; });
  changes.push_back([](ExchangeProblem& p) { p.chunks[1].rows.begin = 1; });
  changes.push_back([](ExchangeProblem& p) { p.chunks.pop_back(); });
  changes.push_back([](ExchangeProblem& p) { p.keys[1].end = 9; });
  changes.push_back([](ExchangeProblem& p) { p.keys[1] = {}; });
  changes.push_back([](ExchangeProblem& p) { p.pairs.pop_back(); });
  for (size_t i = 0; i < changes.size(); ++i) {
    ExchangePlan mutant = plan;
    changes[i](mutant.problem);
    EXPECT_EQ(Validate(mutant).code(), absl::StatusCode::kFailedPrecondition) << "change " << i;
  }
}

}  // namespace
}  // namespace annulus
