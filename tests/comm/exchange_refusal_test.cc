// Plans that are refused, each for one reason, and what is said about them.

#include <gtest/gtest.h>

#include "annulus/comm/exchange_build.h"
#include "comm/plan_edits.h"
#include "comm/plan_judge.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::InsertStep;
using testing::RemoveStep;

// Two ranks, full mask, 4 rows each.
ExchangeCase TwoRanks(int64_t heads = 1, int64_t kv_heads = 1) {
  return ExchangeCaseMaker(1).Make(2, 4, 8, CaseLayout::kContiguous, CaseMask::kFull,
                                   {.heads = heads, .kv_heads = kv_heads});
}
ExchangePlan Ring(Pass pass) { return BuildPlan(TwoRanks().problem, pass, {}).value(); }
// Both groups read KV head 0.
ExchangePlan Ulysses(Pass pass) { return BuildPlan(TwoRanks(2, 1).problem, pass, {.head_split = 2}).value(); }

Step& Find(ExchangePlan& plan, StepKind kind) {
  for (Step& step : plan.ranks[0].steps) {
    if (step.kind == kind) return step;
  }
  ADD_FAILURE() << "no such step in\n" << ToString(plan);
  return plan.ranks[0].steps[0];
}
SlotSpec& Find(ExchangePlan& plan, Payload payload, bool home) {
  for (SlotSpec& slot : plan.ranks[0].slots) {
    if (slot.payload == payload && slot.home == home) return slot;
  }
  ADD_FAILURE() << "no such slot in\n" << ToString(plan);
  return plan.ranks[0].slots[0];
}
int IndexOf(const ExchangePlan& plan, const SlotSpec& slot) {
  return static_cast<int>(&slot - plan.ranks[0].slots.data());
}

struct Refusal {
  const char* message;  // part of it
  std::function<void(ExchangePlan&)> change;
};

void ExpectRefused(const ExchangePlan& plan, const std::vector<Refusal>& refusals) {
  ASSERT_EQ(Validate(plan), absl::OkStatus()) << ToString(plan);
  for (const Refusal& refusal : refusals) {
    ExchangePlan changed = plan;
    refusal.change(changed);
    const absl::Status status = Validate(changed);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(std::string(status.message()).find(refusal.message), std::string::npos)
        << "expected: " << refusal.message << "\nbut: " << status;
    EXPECT_EQ(status.message().find(plan.name), 0u) << status;
  }
}

TEST(Refused, Problems) {
  using Plan = ExchangePlan;
  ExpectRefused(
      Ring(Pass::kForward),
      {{"problem: 3 ranks, 4 rows a block, 2 rank plans", [](Plan& p) { p.problem.ranks = 3; }},
       {"chunks do not cover the block of rank 0 in order", [](Plan& p) { p.problem.block_rows = 5; }},
       {"chunks do not cover the block of rank 0", [](Plan& p) { p.problem.chunks[0].owner = 1; }},
       {"chunks do not cover the block of rank 1", [](Plan& p) { p.problem.chunks[1].rows.begin = 1; }},
       {"1 chunks, 4 key ranges, 4 costs", [](Plan& p) { p.problem.chunks.pop_back(); }},
       {"sees rows [0, 9) of chunk 1, which has rows [0, 4)", [](Plan& p) { p.problem.keys[1].end = 9; }},
       {"chunk 0 against rows [0, 0) of chunk 1 has 16 pairs: expected none",
        [](Plan& p) { p.problem.keys[1] = {}; }},
       {"chunk 0 against rows [0, 4) of chunk 1 has 0 pairs: expected at least 1",
        [](Plan& p) { p.problem.pairs[1] = 0; }},
       {"2 chunks, 4 key ranges, 3 costs", [](Plan& p) { p.problem.pairs.pop_back(); }},
       {"3 query heads over 2 kv heads: expected a multiple",
        [](Plan& p) { p.problem.heads = 3, p.problem.kv_heads = 2; }}});
}

TEST(Refused, HeadGroups) {
  using Plan = ExchangePlan;
  ExpectRefused(
      Ulysses(Pass::kForward),
      {{"query head 1 is in 0 head groups: expected 1", [](Plan& p) { p.groups[1] = {}; }},
       {"query head 0 is in 2 head groups",
        [](Plan& p) { p.groups[1] = {.q_begin = 0, .q_end = 2, .kv_heads = {0}}; }},
       {"head group 1 has query heads [1, 3) of 2", [](Plan& p) { p.groups[1].q_end = 3; }},
       {"head group 1: query head 1 would read kv head 1: expected 0",
        [](Plan& p) { p.groups[1].kv_heads = {1}; }},
       {"head group 1 has 1 query heads over 2 kv heads", [](Plan& p) { p.groups[1].kv_heads = {0, 0}; }},
       {"super_rows are those of 1 chunks: expected 2", [](Plan& p) { p.super_rows.pop_back(); }},
       {"super_rows: chunk 1 lies at row 5 of 8", [](Plan& p) { p.super_rows[1] = 5; }},
       {"slot 3 needs super_rows", [](Plan& p) { p.super_rows.clear(), p.super_size = 0; }}});
}

TEST(Refused, Slots) {
  using Plan = ExchangePlan;
  ExpectRefused(
      Ring(Pass::kForward),
      {{"rank 0 slot 3 is of the other pass",
        [](Plan& p) { p.ranks[0].slots[3].payload = Payload::kKvGrad; }},
       {"rank 0 slot 0 gives an operand a width",
        [](Plan& p) { p.ranks[0].slots[0].width = Width::kCompute; }},
       {"rank 0 slot 0 is home to more than a block",
        [](Plan& p) { p.ranks[0].slots[0].span = Span::kSuper; }},
       {"rank 0 slot 3 is of head group 1", [](Plan& p) { p.ranks[0].slots[3].group = 1; }},
       {"rank 0 slot 3 is of head group -1", [](Plan& p) { p.ranks[0].slots[3].group = kAllHeads; }},
       {"rank 0 has 0 home slots of output: expected 1", [](Plan& p) { p.ranks[0].slots[2].home = false; }},
       {"rank 0 has 2 home slots of kv: expected 0 or 1", [](Plan& p) { p.ranks[0].slots[3].home = true; }}});
  ExpectRefused(Ulysses(Pass::kForward),
                {{"slot 0 is home to part of the heads", [](Plan& p) { p.ranks[0].slots[0].group = 0; }}});
}

TEST(Refused, Attends) {
  using Plan = ExchangePlan;
  const auto attend = [](Plan& p) -> Attend& { return Find(p, StepKind::kAttend).attend; };
  ExpectRefused(
      Ring(Pass::kForward),
      {{"rank 0 step 0 (attend", [&](Plan& p) { attend(p).q_slot = 7; }},
       {"there is no slot 7", [&](Plan& p) { attend(p).q_slot = 7; }},
       {"slot 1 does not hold a query", [&](Plan& p) { attend(p).q_slot = 1; }},
       {"a forward plan has kv gradients in slot 2", [&](Plan& p) { attend(p).kv_result = 2; }},
       {"there is no block 2", [&](Plan& p) { attend(p).q_rows[0].block = 2; }},
       {"slot 0 is home of block 0, not of block 1", [&](Plan& p) { attend(p).q_rows[0].block = 1; }},
       {"rows [0, 5): expected some inside [0, 4)", [&](Plan& p) { attend(p).q_rows[0].rows.end = 5; }},
       {"queries of chunk 0 are not in its rows", [&](Plan& p) { attend(p).q_rows[0].rows.end = 3; }},
       {"keys [0, 4) of chunk 0 are not in its rows", [&](Plan& p) { attend(p).kv_rows.clear(); }},
       {"slot 3 has rows of one block: expected none of block 0 beside block 1",
        [](Plan& p) { p.ranks[0].steps[3].attend.kv_rows.push_back({0, {0, 4}}); }},
       {"there is no chunk 0 or 2", [&](Plan& p) { attend(p).pairs[0].kv_chunk = 2; }},
       {"15 pairs: the problem has rows [0, 4), 16 pairs", [&](Plan& p) { attend(p).pairs[0].pairs = 15; }},
       {"chunk 0 against chunk 0 has been computed before",
        [&](Plan& p) { attend(p).pairs.push_back(attend(p).pairs[0]); }},
       {"no rank computes chunk 0 against chunk 0 for head group 0",
        [&](Plan& p) { attend(p).pairs.clear(); }},
       {"adds to slot 2, which is rounded", [](Plan& p) { p.ranks[0].slots[2].width = Width::kCompute; }},
       {"expected block 1 rows [0, 4) in slot 3: there is nothing",
        [](Plan& p) {
          for (size_t r = 0; r < 2; ++r) {
            std::erase_if(p.ranks[r].steps, [](const Step& step) { return IsTransfer(step.kind); });
            for (Step& step : p.ranks[r].steps) step.after.clear();
          }
        }},
       {"waits for step 0: expected an earlier step", [](Plan& p) { p.ranks[0].steps[0].after = {0}; }}});
}

TEST(Refused, AttendsOfSeveralHeadGroups) {
  ExpectRefused(Ulysses(Pass::kForward),
                {{"slots 6 and 5 are of different head groups",
                  [](ExchangePlan& p) { Find(p, StepKind::kAttend).attend.q_slot = 6; }},
                 {"slot 1 holds all heads: expected one head group",
                  [](ExchangePlan& p) { Find(p, StepKind::kAttend).attend.kv_slot = 1; }}});
}

TEST(Refused, CopiesAndSums) {
  using Plan = ExchangePlan;
  const auto reduce = [](Plan& p) -> Step& { return Find(p, StepKind::kReduce); };
  ExpectRefused(
      Ring(Pass::kBackward),
      {{"moves slot 3 to itself", [&](Plan& p) { reduce(p).slot = reduce(p).into; }},
       {"hold different things", [&](Plan& p) { reduce(p).slot = IndexOf(p, Find(p, Payload::kKv, false)); }},
       {"adds up operands",
        [&](Plan& p) {
          reduce(p).slot = IndexOf(p, Find(p, Payload::kKv, true));
          reduce(p).into = IndexOf(p, Find(p, Payload::kKv, false));
        }},
       {"there is no slot -1", [&](Plan& p) { reduce(p).into = -1; }},
       {"which is rounded",
        [&](Plan& p) { p.ranks[0].slots[static_cast<size_t>(reduce(p).into)].width = Width::kCompute; }},
       {"expected block 0 rows [0, 4) in slot 7: there is nothing",
        [&](Plan& p) {
          p.ranks[0].slots.push_back({.payload = Payload::kKvGrad});
          reduce(p).into = 7;
        }},
       {"what they have already",
        [&](Plan& p) {
          const size_t at = static_cast<size_t>(&reduce(p) - p.ranks[0].steps.data());
          InsertStep(&p, {0, at}, Step(reduce(p)));
        }},
       {"kv gradient of block 0 rows [0, 4) for head group 0 ends without the part of chunk 1",
        [&](Plan& p) { RemoveStep(&p, {0, static_cast<size_t>(&reduce(p) - p.ranks[0].steps.data())}); }}});
  const auto copy = [](Plan& p) -> Step& { return Find(p, StepKind::kCopy); };
  ExpectRefused(
      Ulysses(Pass::kBackward),
      {{"writes to slot 0, a home operand", [&](Plan& p) { std::swap(copy(p).slot, copy(p).into); }},
       {"are of different head groups",
        [&](Plan& p) {
          copy(p).slot = 4;  // query of group 0
          ASSERT_EQ(p.ranks[0].slots[4].group, 0);
          ASSERT_EQ(p.ranks[0].slots[static_cast<size_t>(copy(p).into)].group, 1);
        }},
       {"overwrites kv heads that another head group or head of the group has, too: expected an addition",
        [&](Plan& p) { reduce(p).kind = StepKind::kCopy; }},
       {"takes a head group out of a home result",
        [&](Plan& p) {
          std::swap(reduce(p).slot, reduce(p).into);
          reduce(p).kind = StepKind::kCopy;
        }},
       {"expected rows of one chunk in slot", [](Plan& p) {
          p.problem.chunks.insert(p.problem.chunks.begin() + 1, {.owner = 0, .rows = {2, 4}, .position = 2});
          p.problem.chunks[0].rows.end = 2;
          p.problem.keys.assign(9, {});
          p.problem.pairs.assign(9, 0);
          p.super_rows = {0, 2, 4};
        }}});
}

TEST(Refused, Messages) {
  using Plan = ExchangePlan;
  const auto send = [](Plan& p) -> Step& { return Find(p, StepKind::kSend); };
  ExpectRefused(
      Ring(Pass::kForward),
      {{"expected another rank as peer", [&](Plan& p) { send(p).peer = 0; }},
       {"expected a message number of at least 0", [&](Plan& p) { send(p).message = -1; }},
       {"nobody receives it", [](Plan& p) { RemoveStep(&p, {1, 1}); }},
       {"nobody sends it", [](Plan& p) { RemoveStep(&p, {0, 1}); }},
       {"the message is that of rank 0 step", [&](Plan& p) { InsertStep(&p, {0, 1}, Step(send(p))); }},
       {"does not match rank 1 step", [&](Plan& p) { send(p).rows.rows.end = 3; }},
       {"the slots' payload, head group or width differ from those of rank 1 step",
        [&](Plan& p) { send(p).slot = IndexOf(p, Find(p, Payload::kQuery, true)); }},
       {"writes to slot 1, a home operand",
        [](Plan& p) { Find(p, StepKind::kReceive).slot = 1, Find(p, StepKind::kReceive).rows.block = 0; }}});
}

TEST(Refused, EndsOfDifferentWidth) {
  const ExchangePlan plan =
      BuildPlan(TwoRanks().problem, Pass::kForward, {.kind = PlanKind::kTokenRing}).value();
  ExpectRefused(plan,
                {{"the slots' payload, head group or width differ", [](ExchangePlan& p) {
                    for (Step& step : p.ranks[0].steps) {
                      if (step.kind == StepKind::kAttend && step.attend.q_write == ResultWrite::kOverwrite)
                        p.ranks[0].slots[static_cast<size_t>(step.attend.q_result)].width = Width::kCompute;
                    }
                  }}});
}

TEST(Refused, Races) {
  ExpectRefused(Ring(Pass::kForward), {{"may run together with rank 0 step 2 (receive kv of block 1",
                                        [](ExchangePlan& p) { p.ranks[0].steps[3].after.clear(); }}});
}

// Slot 3 of rank 0 is sent; its front half is written anew only then, its back half at once.
TEST(Refused, RacesWithPartOfAStep) {
  ExchangePlan plan = Ring(Pass::kForward);
  const auto add = [&](size_t from, RowRange rows, std::vector<int> send_after,
                       std::vector<int> receive_after) {
    Step step{.kind = StepKind::kSend,
              .slot = from == 0 ? 3 : 1,
              .rows = {1, rows},
              .peer = 1 - static_cast<int>(from),
              .message = 10 + static_cast<int>(plan.ranks[0].steps.size()),
              .after = std::move(send_after)};
    plan.ranks[from].steps.push_back(step);
    step.kind = StepKind::kReceive;
    step.slot = 3;
    step.peer = static_cast<int>(from);
    step.after = std::move(receive_after);
    plan.ranks[1 - from].steps.push_back(step);
  };
  add(0, {0, 4}, {2}, {3});
  add(1, {0, 2}, {}, {3, 4});
  add(1, {2, 4}, {}, {3, 4});
  ExpectRefused(plan,
                {{"rank 0 step 6 (receive kv of block 1 rows [2, 4) into slot 3 from rank 1, message 16): "
                  "may run together with rank 0 step 4 (send kv of block 1 rows [0, 4)",
                  [](ExchangePlan& p) { p.ranks[0].steps[6].after = {3}; }}});
}

// Each rank sends only after it has computed on what the other sends.
TEST(Refused, Deadlocks) {
  const ExchangeCase made = TwoRanks();
  ExchangePlan plan = Ring(Pass::kForward);
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
TEST(Refused, MessagesInAnotherOrderAtTheirOtherEnd) {
  const ExchangeCase made = TwoRanks();
  const ExchangePlan plan = Ring(Pass::kForward);
  // Message 0 in two halves, received in this order or the other.
  for (const bool swap : {false, true}) {
    ExchangePlan split = plan;
    for (size_t r = 0; r < 2; ++r) {
      std::vector<Step>& steps = split.ranks[r].steps;
      const auto whole =
          std::find_if(steps.begin(), steps.end(), [](const Step& step) { return step.message == 0; });
      const size_t at = static_cast<size_t>(whole - steps.begin());
      Step half = *whole;
      half.rows.rows = {0, 2};
      half.message = 7;
      whole->rows.rows = {2, 4};
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

}  // namespace
}  // namespace annulus
