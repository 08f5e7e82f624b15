// Plans in which a step has wrong rows, slots or pairs, or any one field is changed, are refused.

#include "comm/plan_mutations.h"

namespace annulus {
namespace {

using testing::At;
using testing::FieldEdit;

class FieldMutations : public testing::PlanMutations {};

TEST_F(FieldMutations, WrongRows) {
  OnPlans([&] {
    for (const At at : AllSteps()) {
      if (StepAt(at).kind == StepKind::kAttend) continue;
      for (const RowRange change : {RowRange{1, 0}, RowRange{0, -1}, RowRange{-1, 0}, RowRange{0, 1}}) {
        ExchangePlan mutant = plan_;
        const auto resize = [&](const At& where) {
          StepAt(mutant, where).rows.rows.begin += change.begin;
          StepAt(mutant, where).rows.rows.end += change.end;
        };
        resize(at);
        if (!IsTransfer(StepAt(at).kind)) {
          ExpectHarmlessIfAccepted(mutant, "rows");
          continue;
        }
        ExpectRefused(mutant, at, "rows of one end");
        if (StepAt(at).kind != StepKind::kSend) continue;
        resize(ReceiveOf(at));
        ExpectHarmlessIfAccepted(mutant, "rows of both ends");
      }
      ExchangePlan beyond = plan_;
      StepAt(beyond, at).rows.rows.end = plan_.problem.block_rows + 1;
      ExpectRefused(beyond, at, "rows beyond the block");
      ExchangePlan other = plan_;
      StepAt(other, at).rows.block = (StepAt(at).rows.block + 1) % plan_.problem.ranks;
      ExpectRefused(other, at, "rows of another block");
    }
  });
  EXPECT_GT(refused_, 2000);
}

TEST_F(FieldMutations, WrongRowsOfAttend) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kAttend)) {
      for (std::vector<BlockRows> Attend::* list : {&Attend::q_rows, &Attend::kv_rows}) {
        for (size_t i = 0; i < (StepAt(at).attend.*list).size(); ++i) {
          ExchangePlan mutant = plan_;
          ((StepAt(mutant, at).attend.*list)[i]).rows.begin += 1;
          ExpectHarmlessIfAccepted(mutant, "rows");
          (StepAt(mutant, at).attend.*list)
              .erase((StepAt(mutant, at).attend.*list).begin() + static_cast<std::ptrdiff_t>(i));
          ExpectHarmlessIfAccepted(mutant, "dropped rows");
        }
      }
    }
  });
  EXPECT_GT(refused_, 500);
}

// Of the same payload where there is one; the judge knows no head groups and widths that only look alike.
TEST_F(FieldMutations, WrongSlot) {
  OnPlans([&] {
    for (const At at : AllSteps()) {
      const auto indices = [](Step& step) -> std::vector<int*> {
        if (step.kind != StepKind::kAttend) return {&step.slot, &step.into};
        return {&step.attend.q_slot, &step.attend.kv_slot, &step.attend.q_result, &step.attend.kv_result};
      };
      Step copy = StepAt(at);
      for (size_t index = 0; index < indices(copy).size(); ++index) {
        const int own = *indices(copy)[index];
        if (own < 0) continue;
        for (int slot = -1; slot <= static_cast<int>(SlotsOf(at).size()); ++slot) {
          if (slot == own) continue;
          ExchangePlan mutant = plan_;
          *indices(StepAt(mutant, at))[index] = slot;
          const bool exists = 0 <= slot && slot < static_cast<int>(SlotsOf(at).size());
          const bool alike = exists && SlotsOf(at)[static_cast<size_t>(slot)].payload ==
                                           SlotsOf(at)[static_cast<size_t>(own)].payload;
          if (alike) {
            ExpectHarmlessIfAccepted(mutant, "slot");
          } else {
            ExpectRefused(mutant, at, "slot of nothing or another payload");
          }
        }
      }
    }
  });
  EXPECT_GT(refused_, 5000);
  EXPECT_LT(accepted_, refused_ / 20);
}

TEST_F(FieldMutations, WrongHeadGroup) {
  OnPlans([&] {
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < plan_.ranks[r].slots.size(); ++s) {
        ExchangePlan mutant = plan_;
        SlotSpec& slot = mutant.ranks[r].slots[s];
        slot.group = plan_.groups.size() == 1  ? 1
                     : slot.group == kAllHeads ? 0
                                               : (slot.group + 1) % static_cast<int>(plan_.groups.size());
        ExpectRefused(mutant, {r, 0}, absl::StrCat("head group of slot ", s));
      }
    }
    for (size_t g = 0; g < plan_.groups.size(); ++g) {
      ExchangePlan mutant = plan_;
      mutant.groups[g].q_end += 1;
      ExpectRefused(mutant, {0, 0}, "more heads");
      mutant.groups[g].q_end -= 2;
      ExpectRefused(mutant, {0, 0}, "fewer heads");
      mutant.groups[g].q_end += 1;
      mutant.groups[g].kv_heads[0] += 1;
      ExpectRefused(mutant, {0, 0}, "kv head");
    }
  });
  EXPECT_GT(refused_, 300);
}

// A rounded result that is added to, and ends of messages that differ.
TEST_F(FieldMutations, WrongWidth) {
  OnPlans([&] {
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < plan_.ranks[r].slots.size(); ++s) {
        ExchangePlan mutant = plan_;
        Width& width = mutant.ranks[r].slots[s].width;
        width = width == Width::kCompute ? Width::kAccumulator : Width::kCompute;
        ExpectHarmlessIfAccepted(mutant, absl::StrCat("width of slot ", s));
        if (!IsResult(plan_.ranks[r].slots[s].payload)) ExpectRefused(mutant, {r, 0}, "width of an operand");
      }
    }
  });
  EXPECT_GT(refused_, 300);
}

TEST_F(FieldMutations, WrongWriteMode) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kAttend)) {
      for (ResultWrite Attend::* write : {&Attend::q_write, &Attend::kv_write}) {
        if (plan_.pass == Pass::kForward && write == &Attend::kv_write) continue;
        ExchangePlan mutant = plan_;
        if (StepAt(at).attend.*write == ResultWrite::kAccumulate) {
          StepAt(mutant, at).attend.*write = ResultWrite::kOverwrite;
          ExpectJudged(mutant, at, "overwrites");
        } else {
          StepAt(mutant, at).attend.*write = ResultWrite::kAccumulate;
          ExpectRefused(mutant, at, "adds to what was there");
        }
      }
    }
  });
  EXPECT_GT(refused_, 200);
}

TEST_F(FieldMutations, WrongPairs) {
  OnPlans([&] {
    for (const At at : StepsOf(StepKind::kAttend)) {
      for (size_t p = 0; p < StepAt(at).attend.pairs.size(); ++p) {
        const std::vector<std::function<void(BlockPair&)>> changes = {
            [](BlockPair& pair) { pair.pairs += 1; }, [](BlockPair& pair) { pair.keys.end -= 1; },
            [](BlockPair& pair) { pair.q_chunk += 1; }, [](BlockPair& pair) { pair.kv_chunk += 2; },
            [](BlockPair& pair) { pair.kv_chunk = -1; }};
        for (const auto& change : changes) {
          ExchangePlan mutant = plan_;
          change(StepAt(mutant, at).attend.pairs[p]);
          ExpectRefused(mutant, at, "pair");
        }
        ExchangePlan mutant = plan_;
        std::vector<BlockPair>& pairs = StepAt(mutant, at).attend.pairs;
        pairs.push_back(pairs[p]);
        ExpectRefused(mutant, at, "doubled pair");
        pairs.pop_back();
        pairs.erase(pairs.begin() + static_cast<std::ptrdiff_t>(p));
        ExpectRefused(mutant, at, "dropped pair");
      }
    }
  });
  EXPECT_GT(refused_, 2000);
}

// Computed by another rank, or in another step, as well.
TEST_F(FieldMutations, APairComputedTwice) {
  OnPlans([&] {
    const std::vector<At> attends = StepsOf(StepKind::kAttend);
    for (size_t i = 1; i < attends.size(); ++i) {
      if (StepAt(attends[i]).attend.pairs.empty() || StepAt(attends[i - 1]).attend.pairs.empty()) continue;
      ExchangePlan mutant = plan_;
      StepAt(mutant, attends[i]).attend.pairs.push_back(StepAt(attends[i - 1]).attend.pairs.back());
      // For another head group it is missing no more than it was.
      ExpectRefused(mutant, attends[i], "pair of another step");
    }
  });
  EXPECT_GT(refused_, 200);
}

// Any field of a plan, wherever it is. What is accepted has no race, and runs to the right result.
TEST_F(FieldMutations, AnyOneField) {
  OnPlans([&] {
    ExchangePlan same = plan_;
    const int64_t fields = FieldEdit::Apply(&same, -1, 1);
    for (int64_t field = 0; field < fields; field += 1 + fields / 200) {
      for (const int64_t delta : {1, -1}) {
        ExchangePlan mutant = plan_;
        std::string what;
        FieldEdit::Apply(&mutant, field, delta, &what);
        if (what.empty()) continue;
        ExpectHarmlessIfAccepted(mutant, absl::StrCat("field ", field, " of ", fields, ": ", what));
      }
    }
  });
  EXPECT_GT(refused_, 5000);
  EXPECT_GT(accepted_, 500);
}

}  // namespace
}  // namespace annulus
