// Broken plans are refused. Some changes break nothing (an edge that others imply, a slot that was free
// anyway): for those a judge that shares no code with Validate (plan_judge.h) decides what the answer must
// be.

#include <gtest/gtest.h>

#include "annulus/comm/exchange_build.h"
#include "comm/plan_edits.h"
#include "comm/plan_judge.h"

namespace annulus {
namespace {

using testing::At;
using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::FieldEdit;
using testing::InsertStep;
using testing::RemoveStep;

struct Kind {
  PlanChoice choice;
  int ranks;
  CaseLayout layout;
  CaseMask mask;
  int64_t heads = 1, kv_heads = 1;
};

std::vector<Kind> Kinds() {
  constexpr CaseLayout kZigzag = CaseLayout::kZigzag, kContiguous = CaseLayout::kContiguous;
  return {
      {{.kind = PlanKind::kAllGather}, 3, kZigzag, CaseMask::kCausal},
      {{.kind = PlanKind::kKvRing}, 4, kZigzag, CaseMask::kCausal},
      {{.kind = PlanKind::kKvRing}, 5, CaseLayout::kStriped, CaseMask::kDocuments},
      {{.kind = PlanKind::kBidirectionalKvRing}, 4, kContiguous, CaseMask::kSparse},
      {{.kind = PlanKind::kDirectCast}, 6, kZigzag, CaseMask::kSparse},
      {{.kind = PlanKind::kTokenRing, .output_width = Width::kCompute}, 4, kZigzag, CaseMask::kCausal},
      {{.kind = PlanKind::kTokenRing, .parts = 2}, 3, kContiguous, CaseMask::kWindow},
      {{.kind = PlanKind::kBidirectionalTokenRing}, 4, kZigzag, CaseMask::kFull},
      {{.kind = PlanKind::kBalanced}, 5, kContiguous, CaseMask::kCausal},
      {{.kind = PlanKind::kDoubleRing, .inner = 2}, 6, kZigzag, CaseMask::kWindow},
      {{.kind = PlanKind::kMesh, .inner = 2}, 4, kZigzag, CaseMask::kFull},
      {{.head_split = 3}, 3, kZigzag, CaseMask::kCausal, 5, 5},
      {{.head_split = 4}, 4, kZigzag, CaseMask::kDocuments, 6, 2},
      {{.kind = PlanKind::kKvRing, .head_split = 2}, 4, kZigzag, CaseMask::kCausal, 4, 2},
      {{.kind = PlanKind::kTokenRing, .head_split = 2}, 6, kZigzag, CaseMask::kCausal, 3, 1},
  };
}

class Mutations : public ::testing::Test {
 protected:
  void TearDown() override {
    RecordProperty("refused", refused_);
    RecordProperty("accepted", accepted_);
  }

  // Calls fn with a plan of each kind and pass.
  void OnPlans(const std::function<void()>& fn) {
    for (const Kind& kind : Kinds()) {
      ExchangeCaseMaker maker(static_cast<uint64_t>(kind.ranks));
      made_ = maker.Make(kind.ranks, 4, 4 * kind.ranks - kind.ranks / 4, kind.layout, kind.mask,
                         {.parts = ChunkParts(kind.choice), .heads = kind.heads, .kv_heads = kind.kv_heads});
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        plan_ = BuildPlan(made_.problem, pass, kind.choice).value();
        ASSERT_EQ(Validate(plan_), absl::OkStatus());
        SCOPED_TRACE(absl::StrCat(NameOf(kind.choice, kind.ranks), ", ", made_.name));
        fn();
      }
    }
  }

  // Those that a change is tried on: at most about 40 of a plan, spread over it.
  std::vector<At> StepsWhere(const std::function<bool(const Step&)>& condition) const {
    std::vector<At> all, some;
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < plan_.ranks[r].steps.size(); ++s) {
        if (condition(plan_.ranks[r].steps[s])) all.push_back({r, s});
      }
    }
    for (size_t i = 0; i < all.size(); i += 1 + all.size() / 40) some.push_back(all[i]);
    return some;
  }
  std::vector<At> AllSteps() const {
    return StepsWhere([](const Step&) { return true; });
  }
  std::vector<At> StepsOf(StepKind kind) const {
    return StepsWhere([=](const Step& step) { return step.kind == kind; });
  }
  std::vector<At> Transfers() const {
    return StepsWhere([](const Step& step) { return IsTransfer(step.kind); });
  }
  const Step& StepAt(const At& at) const { return plan_.ranks[at.rank].steps[at.step]; }
  static Step& StepAt(ExchangePlan& plan, const At& at) { return plan.ranks[at.rank].steps[at.step]; }
  At ReceiveOf(const At& send) const {
    const size_t to = static_cast<size_t>(StepAt(send).peer);
    size_t s = 0;
    while (plan_.ranks[to].steps[s].kind != StepKind::kReceive ||
           plan_.ranks[to].steps[s].message != StepAt(send).message)
      ++s;
    return {to, s};
  }
  const std::vector<SlotSpec>& SlotsOf(const At& at) const { return plan_.ranks[at.rank].slots; }

  void ExpectRefused(const ExchangePlan& mutant, const At& at, const std::string& what) {
    ++refused_;
    const absl::Status status = Validate(mutant);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition)
        << what << " at rank " << at.rank << " step " << at.step << "\n"
        << ToString(mutant);
  }
  // Empty if the plan is harmless.
  std::string Judge(const ExchangePlan& plan) const {
    if (testing::HasRace(plan)) return "race";
    for (const uint64_t seed : {1, 2}) {
      if (std::string wrong = testing::RunInRandomOrder(made_, plan, seed); !wrong.empty()) return wrong;
    }
    return "";
  }
  // Refused if steps may race or a run goes wrong, accepted otherwise.
  void ExpectJudged(const ExchangePlan& mutant, const At& at, const std::string& what) {
    const std::string wrong = Judge(mutant);
    const absl::Status status = Validate(mutant);
    EXPECT_EQ(status.ok(), wrong.empty()) << what << " at rank " << at.rank << " step " << at.step << "\n"
                                          << "judge: " << wrong << "\nValidate: " << status << "\n"
                                          << ToString(mutant);
    ++(wrong.empty() ? accepted_ : refused_);
  }
  // Refused if steps may race or a run goes wrong; perhaps even if not, as of bad form.
  void ExpectHarmlessIfAccepted(const ExchangePlan& mutant, const std::string& what) {
    const absl::Status status = Validate(mutant);
    ++(status.ok() ? accepted_ : refused_);
    if (!status.ok()) return;
    const std::string wrong = Judge(mutant);
    EXPECT_EQ(wrong, "") << what << "\n" << ToString(mutant);
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

TEST_F(Mutations, WrongRows) {
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

TEST_F(Mutations, WrongRowsOfAttend) {
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
TEST_F(Mutations, WrongSlot) {
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

TEST_F(Mutations, WrongHeadGroup) {
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
TEST_F(Mutations, WrongWidth) {
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

TEST_F(Mutations, WrongWriteMode) {
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

TEST_F(Mutations, WrongPairs) {
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
TEST_F(Mutations, APairComputedTwice) {
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

// Any field of a plan, wherever it is. What is accepted has no race, and runs to the right result.
TEST_F(Mutations, AnyOneField) {
  OnPlans([&] {
    ExchangePlan same = plan_;
    const int64_t fields = FieldEdit::Apply(&same, -1, 1);
    for (int64_t field = 0; field < fields; field += 1 + fields / 400) {
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
