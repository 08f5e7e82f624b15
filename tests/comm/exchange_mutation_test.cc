// Broken plans are refused. Some changes break nothing (an edge that others imply, a slot that was free
// anyway): for those a judge that shares no code with Validate decides what the answer must be.

#include <gtest/gtest.h>

#include "comm/exchange_cases.h"
#include "comm/plan_edits.h"

namespace annulus {
namespace {

using testing::At;
using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::InsertStep;
using testing::RemoveStep;

bool IsAttendOrReduce(const Step& step) {
  return step.kind == StepKind::kAttend || step.kind == StepKind::kReduce;
}

class Mutations : public ::testing::Test {
 protected:
  // Calls fn with plans of several kinds.
  void OnPlans(const std::function<void()>& fn) {
    const std::vector<std::pair<int, CaseMask>> kinds = {
        {2, CaseMask::kCausal}, {3, CaseMask::kFull},   {4, CaseMask::kCausal}, {5, CaseMask::kDocuments},
        {6, CaseMask::kWindow}, {7, CaseMask::kSparse}, {8, CaseMask::kSparse}};
    for (const auto& [ranks, mask] : kinds) {
      ExchangeCaseMaker maker(static_cast<uint64_t>(ranks));
      made_ = maker.Make(ranks, 4, 4 * ranks - ranks / 4, CaseLayout::kZigzag, mask);
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        plan_ = BuildKvRing(made_.problem, pass);
        ASSERT_TRUE(Validate(plan_).ok());
        SCOPED_TRACE(made_.name);
        fn();
      }
    }
  }

  std::vector<At> StepsWhere(const std::function<bool(const Step&)>& condition) const {
    std::vector<At> result;
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < plan_.ranks[r].steps.size(); ++s) {
        if (condition(plan_.ranks[r].steps[s])) result.push_back({r, s});
      }
    }
    return result;
  }
  std::vector<At> StepsOf(StepKind kind) const {
    return StepsWhere([&](const Step& step) { return step.kind == kind; });
  }
  const Step& StepAt(const At& at) const { return plan_.ranks[at.rank].steps[at.step]; }
  static Step& StepAt(ExchangePlan& plan, const At& at) { return plan.ranks[at.rank].steps[at.step]; }
  At ReceiveOf(const At& send) const {
    const int message = StepAt(send).message;
    return StepsWhere(
        [&](const Step& step) { return step.kind == StepKind::kReceive && step.message == message; })[0];
  }

  void ExpectRefused(const ExchangePlan& mutant, const At& at, const std::string& what) {
    ++refused_;
    const absl::Status status = Validate(mutant);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition)
        << what << " at rank " << at.rank << " step " << at.step << "\n"
        << ToString(mutant);
  }
  // Refused if steps may race or a run goes wrong, accepted otherwise.
  void ExpectJudged(const ExchangePlan& mutant, const At& at, const std::string& what) {
    std::string wrong = testing::HasRace(mutant) ? "race" : testing::RunInRandomOrder(made_, mutant, 1);
    const absl::Status status = Validate(mutant);
    EXPECT_EQ(status.ok(), wrong.empty()) << what << " at rank " << at.rank << " step " << at.step << "\n"
                                          << "judge: " << wrong << "\nValidate: " << status << "\n"
                                          << ToString(mutant);
    ++(wrong.empty() ? accepted_ : refused_);
  }

  ExchangeCase made_;
  ExchangePlan plan_;
  int refused_ = 0, accepted_ = 0;
};

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
  EXPECT_GT(refused_, 200);
}

TEST_F(Mutations, ADroppedStep) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step&) { return true; })) {
      ExchangePlan mutant = plan_;
      RemoveStep(&mutant, at);
      ExpectRefused(mutant, at, "dropped step");
    }
  });
  EXPECT_GT(refused_, 200);
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
  EXPECT_GT(refused_, 100);
  EXPECT_EQ(accepted_, 0);  // no plan moves rows in vain
}

TEST_F(Mutations, SwappedPeers) {
  OnPlans([&] {
    const int ranks = plan_.problem.ranks;
    for (const At at : StepsWhere([](const Step& step) { return step.peer >= 0; })) {
      for (const int shift : {1, ranks - 1, ranks}) {  // the last gives a rank that does not exist
        ExchangePlan mutant = plan_;
        int& peer = StepAt(mutant, at).peer;
        peer = shift == ranks ? ranks : (peer + shift) % ranks;
        ExpectRefused(mutant, at, "swapped peer");
      }
    }
  });
  EXPECT_GT(refused_, 200);
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
  EXPECT_GT(refused_, 100);
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
  EXPECT_GT(refused_, 100);
}

// Visits alternate between slots; using one of them for both reuses it while it is read or on its way.
TEST_F(Mutations, EarlyReuseOfASlot) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kReceive)) {
      ExchangePlan unordered = plan_;
      StepAt(unordered, at).after.clear();
      ExpectJudged(unordered, at, "receive that waits for nothing");
      const RankPlan& rank = plan_.ranks[at.rank];
      for (size_t slot = 0; slot < rank.slots.size(); ++slot) {
        if (static_cast<int>(slot) == StepAt(at).slot) continue;
        // The whole visit moves to another slot.
        ExchangePlan mutant = plan_;
        for (Step& step : mutant.ranks[at.rank].steps) {
          if (step.block == StepAt(at).block && step.slot == StepAt(at).slot)
            step.slot = static_cast<int>(slot);
        }
        if (rank.slots[slot].payload == rank.slots[static_cast<size_t>(StepAt(at).slot)].payload) {
          ExpectJudged(mutant, at, "early reuse");
        } else {
          ExpectRefused(mutant, at, "slot of another payload");
        }
      }
    }
  });
  EXPECT_GT(refused_, 200);
}

TEST_F(Mutations, WrongRows) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step& step) { return step.rows.size() > 1; })) {
      for (const RowRange change : {RowRange{1, 0}, RowRange{0, -1}}) {
        ExchangePlan mutant = plan_;
        const auto shrink = [&](const At& where) {
          StepAt(mutant, where).rows.begin += change.begin;
          StepAt(mutant, where).rows.end += change.end;
        };
        shrink(at);
        const bool transfer = StepAt(at).peer >= 0;
        const bool reads_outside =
            std::any_of(StepAt(at).pairs.begin(), StepAt(at).pairs.end(), [&](const BlockPair& pair) {
              return pair.keys.begin < StepAt(mutant, at).rows.begin ||
                     StepAt(mutant, at).rows.end < pair.keys.end;
            });
        if (transfer || reads_outside) {
          ExpectRefused(mutant, at, "rows of one end");
        } else {
          ExpectJudged(mutant, at, "rows");
        }
        if (StepAt(at).kind != StepKind::kSend) continue;
        shrink(ReceiveOf(at));
        ExpectJudged(mutant, at, "rows of both ends");
      }
      ExchangePlan beyond = plan_;
      StepAt(beyond, at).rows.end = plan_.problem.block_rows + 1;
      ExpectRefused(beyond, at, "rows beyond the block");
    }
  });
  EXPECT_GT(refused_, 300);
}

TEST_F(Mutations, WrongSlotOfOneStep) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step&) { return true; })) {
      const std::vector<SlotSpec>& slots = plan_.ranks[at.rank].slots;
      for (size_t slot = 0; slot < slots.size(); ++slot) {
        const Step& step = StepAt(at);
        if (step.slot == static_cast<int>(slot) || step.grad_slot == static_cast<int>(slot)) continue;
        if (slots[slot].payload != slots[static_cast<size_t>(step.slot)].payload) continue;
        ExchangePlan mutant = plan_;
        StepAt(mutant, at).slot = static_cast<int>(slot);
        ExpectJudged(mutant, at, "slot");
      }
      ExchangePlan mutant = plan_;
      StepAt(mutant, at).slot = static_cast<int>(slots.size());
      ExpectRefused(mutant, at, "slot that does not exist");
    }
  });
  EXPECT_GT(refused_, 300);
}

TEST_F(Mutations, ADuplicateAttend) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kAttend)) {
      ExchangePlan mutant = plan_;
      InsertStep(&mutant, at, StepAt(at));
      ExpectRefused(mutant, at, "duplicate attend");
    }
  });
  EXPECT_GT(refused_, 50);
}

TEST_F(Mutations, ADuplicateReduce) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kReduce)) {
      ExchangePlan mutant = plan_;
      InsertStep(&mutant, at, StepAt(at));
      ExpectRefused(mutant, at, "duplicate reduce");
    }
  });
  EXPECT_GT(refused_, 20);
}

TEST_F(Mutations, WrongPairs) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kAttend)) {
      for (size_t p = 0; p < StepAt(at).pairs.size(); ++p) {
        const std::vector<std::function<void(BlockPair&)>> changes = {
            [](BlockPair& pair) { pair.pairs += 1; }, [](BlockPair& pair) { pair.keys.end -= 1; },
            [](BlockPair& pair) { pair.q_chunk += 1; }, [](BlockPair& pair) { pair.kv_chunk += 2; },
            [](BlockPair& pair) { pair.kv_chunk = -1; }};
        for (const auto& change : changes) {
          ExchangePlan mutant = plan_;
          change(StepAt(mutant, at).pairs[p]);
          ExpectRefused(mutant, at, "pair");
        }
        ExchangePlan mutant = plan_;
        std::vector<BlockPair>& pairs = StepAt(mutant, at).pairs;
        pairs.erase(pairs.begin() + static_cast<std::ptrdiff_t>(p));
        ExpectRefused(mutant, at, "dropped pair");
      }
    }
  });
  EXPECT_GT(refused_, 300);
}

TEST_F(Mutations, WrongGradientWrite) {
  OnPlans([&] {
    if (plan_.pass == Pass::kForward) return;
    for (const At at : StepsOf(StepKind::kAttend)) {
      ExchangePlan mutant = plan_;
      if (StepAt(at).grad_write == GradWrite::kAccumulate) {
        StepAt(mutant, at).grad_write = GradWrite::kOverwrite;
        ExpectJudged(mutant, at, "overwrites");
      } else {  // refused even where the rows happen to be zero still, from an earlier block
        StepAt(mutant, at).grad_write = GradWrite::kAccumulate;
        ExpectRefused(mutant, at, "adds to what was there");
      }
    }
  });
  EXPECT_GT(refused_, 20);
}

TEST_F(Mutations, ADependencyOnALaterStep) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step&) { return true; })) {
      for (const int before : {static_cast<int>(at.step), static_cast<int>(at.step) + 1, -1}) {
        ExchangePlan mutant = plan_;
        StepAt(mutant, at).after.push_back(before);
        ExpectRefused(mutant, at, "dependency on no earlier step");
      }
    }
  });
  EXPECT_GT(refused_, 300);
}

// A transfer that waits for all computing before it in the list: slower, and perhaps never.
TEST_F(Mutations, WaitingForCompute) {
  OnPlans([&] {
    for (const At at : StepsWhere([](const Step& step) { return step.peer >= 0; })) {
      ExchangePlan mutant = plan_;
      for (size_t s = 0; s < at.step; ++s) {
        if (IsAttendOrReduce(plan_.ranks[at.rank].steps[s]))
          StepAt(mutant, at).after.push_back(static_cast<int>(s));
      }
      ExpectJudged(mutant, at, "waits for compute");
    }
  });
  EXPECT_GT(accepted_, 100);
}

}  // namespace
}  // namespace annulus
