// Plans whose steps are dropped, doubled or reordered, or whose messages and dependencies are wrong, are
// refused.

#include "comm/plan_mutations.h"

namespace annulus {
namespace {

using testing::At;
using testing::InsertStep;
using testing::RemoveStep;

class Mutations : public testing::PlanMutations {};

TEST_F(Mutations, ADroppedDependency) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step& step) { return !step.after.empty(); })) {
      for (size_t edge = 0; edge < StepAt(at).after.size(); ++edge) {
        ExchangePlan mutant = plan_;
        std::vector<int>& after = StepAt(mutant, at).after;
        after.erase(after.begin() + static_cast<std::ptrdiff_t>(edge));
        ExpectJudged(mutant, at, "dropped dependency");
      }
    }
  });
  EXPECT_GT(refused_, 500);
}

TEST_F(Mutations, ADroppedStep) {
  OnPlans([&] {
    for (const At at : AllSteps()) {
      ExchangePlan mutant = plan_;
      RemoveStep(&mutant, at);
      ExpectJudged(mutant, at, "dropped step");
    }
  });
  EXPECT_GT(refused_, 800);
  EXPECT_EQ(accepted_, 0);  // no plan does anything in vain
}

TEST_F(Mutations, ADroppedMessage) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kSend)) {
      ExchangePlan mutant = plan_;
      RemoveStep(&mutant, ReceiveOf(at));
      RemoveStep(&mutant, at);
      ExpectJudged(mutant, at, "dropped message");
    }
  });
  EXPECT_GT(refused_, 500);
  EXPECT_EQ(accepted_, 0);
}

// A partial result that comes, but is not added; or comes and is added with nobody to send it.
TEST_F(Mutations, ADroppedReturn) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kSend)) {
      if (!IsResult(SlotsOf(at)[static_cast<size_t>(StepAt(at).slot)].payload)) continue;
      const At receive = ReceiveOf(at);
      ExchangePlan mutant = plan_;
      for (size_t s = receive.step + 1; s < plan_.ranks[receive.rank].steps.size(); ++s) {
        const Step& step = plan_.ranks[receive.rank].steps[s];
        const bool takes = IsCompute(step.kind) && step.kind != StepKind::kAttend &&
                           step.slot == StepAt(receive).slot && step.rows == StepAt(receive).rows;
        if (!takes) continue;
        RemoveStep(&mutant, {receive.rank, s});
        break;
      }
      ExpectJudged(mutant, receive, "result not added");
      RemoveStep(&mutant, receive);
      RemoveStep(&mutant, at);
      ExpectJudged(mutant, receive, "result not sent");
    }
  });
  EXPECT_GT(refused_, 300);
  EXPECT_EQ(accepted_, 0);
}

TEST_F(Mutations, SwappedPeers) {
  OnPlans([&] {
    const int ranks = plan_.problem.ranks;
    for (const At at : Transfers()) {
      for (const int shift : {1, ranks - 1, ranks}) {  // the last gives a rank that does not exist
        ExchangePlan mutant = plan_;
        int& peer = StepAt(mutant, at).peer;
        peer = shift == ranks ? ranks : (peer + shift) % ranks;
        ExpectRefused(mutant, at, "swapped peer");
      }
    }
  });
  EXPECT_GT(refused_, 800);
}

TEST_F(Mutations, SwappedMessages) {
  OnPlans([&] {
    for (const StepKind kind : {StepKind::kSend, StepKind::kReceive}) {
      const std::vector<At> moves = StepsOf(kind);
      for (size_t i = 1; i < moves.size(); ++i) {
        ExchangePlan mutant = plan_;
        std::swap(StepAt(mutant, moves[i - 1]).message, StepAt(mutant, moves[i]).message);
        ExpectRefused(mutant, moves[i], "swapped messages");
      }
    }
  });
  EXPECT_GT(refused_, 800);
}

TEST_F(Mutations, AMessageNumberUsedTwiceOrOutOfRange) {
  OnPlans([&] {
    const std::vector<At> sends = StepsOf(StepKind::kSend);
    for (size_t i = 1; i < sends.size(); ++i) {
      for (const int message : {StepAt(sends[0]).message, -1}) {
        ExchangePlan mutant = plan_;
        StepAt(mutant, sends[i]).message = message;
        StepAt(mutant, ReceiveOf(sends[i])).message = message;
        ExpectRefused(mutant, sends[i], "message number");
      }
    }
  });
  EXPECT_GT(refused_, 500);
}

// Neighbours in the list change places, with what they wait for: computing steps then run in another order.
TEST_F(Mutations, ReorderedSteps) {
  OnPlans([&] {
    for (const At at : AllSteps()) {
      const std::vector<Step>& steps = plan_.ranks[at.rank].steps;
      if (at.step + 1 == steps.size()) continue;
      ExchangePlan mutant = plan_;
      std::vector<Step>& changed = mutant.ranks[at.rank].steps;
      std::swap(changed[at.step], changed[at.step + 1]);
      const int first = static_cast<int>(at.step);
      std::erase(changed[at.step].after, first);
      for (size_t s = at.step + 2; s < changed.size(); ++s) {
        for (int& before : changed[s].after)
          before = before == first ? first + 1 : before == first + 1 ? first : before;
      }
      const bool same_kind = changed[at.step].kind == changed[at.step + 1].kind;
      if (IsTransfer(changed[at.step].kind) && same_kind) {
        ExpectHarmlessIfAccepted(mutant, "reordered");  // both ends must list messages alike
      } else {
        ExpectJudged(mutant, at, "reordered");
      }
    }
  });
  EXPECT_GT(refused_, 200);
  EXPECT_GT(accepted_, 200);
}

// Slots are taken in turn; using one of them early reuses it while it is read or on its way.
TEST_F(Mutations, EarlyReuseOfASlot) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kReceive)) {
      ExchangePlan unordered = plan_;
      StepAt(unordered, at).after.clear();
      ExpectJudged(unordered, at, "receive that waits for nothing");
      const int own = StepAt(at).slot, block = StepAt(at).rows.block;
      for (size_t slot = 0; slot < SlotsOf(at).size(); ++slot) {
        if (static_cast<int>(slot) == own || !(SlotsOf(at)[slot] == SlotsOf(at)[static_cast<size_t>(own)]))
          continue;
        // All that happens to the block in its slot happens in another.
        ExchangePlan mutant = plan_;
        const auto move = [&](int* s) { *s = *s == own ? static_cast<int>(slot) : *s; };
        for (Step& step : mutant.ranks[at.rank].steps) {
          const bool attends = step.kind == StepKind::kAttend;
          if (!attends && step.rows.block == block) move(&step.slot), move(&step.into);
          if (attends && !step.attend.q_rows.empty() && step.attend.q_rows[0].block == block)
            move(&step.attend.q_slot), move(&step.attend.q_result);
          if (attends && !step.attend.kv_rows.empty() && step.attend.kv_rows[0].block == block)
            move(&step.attend.kv_slot), move(&step.attend.kv_result);
        }
        ExpectJudged(mutant, at, "early reuse");
      }
    }
  });
  EXPECT_GT(refused_, 500);
}

TEST_F(Mutations, ADuplicateComputingStep) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step& step) { return IsCompute(step.kind); })) {
      ExchangePlan mutant = plan_;
      InsertStep(&mutant, at, StepAt(at));
      if (StepAt(at).kind == StepKind::kCopy) {
        ExpectJudged(mutant, at, "duplicate copy");
      } else if (StepAt(at).kind == StepKind::kReduce || !StepAt(at).attend.pairs.empty()) {
        ExpectRefused(mutant, at, "duplicate step");
      }
    }
  });
  EXPECT_GT(refused_, 300);
}

TEST_F(Mutations, ADependencyOnALaterStep) {
  OnPlans([&] {
    for (const At at : AllSteps()) {
      for (const int before : {static_cast<int>(at.step), static_cast<int>(at.step) + 1, -1}) {
        ExchangePlan mutant = plan_;
        StepAt(mutant, at).after.push_back(before);
        ExpectRefused(mutant, at, "dependency on no earlier step");
      }
    }
  });
  EXPECT_GT(refused_, 800);
}

// A transfer that waits for all computing before it in the list: slower, and perhaps never.
TEST_F(Mutations, WaitingForCompute) {
  OnPlans([&] {
    for (const At at : Transfers()) {
      ExchangePlan mutant = plan_;
      for (size_t s = 0; s < at.step; ++s) {
        if (IsCompute(plan_.ranks[at.rank].steps[s].kind))
          StepAt(mutant, at).after.push_back(static_cast<int>(s));
      }
      ExpectJudged(mutant, at, "waits for compute");
    }
  });
  EXPECT_GT(accepted_, 500);
}

}  // namespace
}  // namespace annulus
