#pragma once

// Plans of every kind to change, and what must come of a change. Some break nothing (an edge that others
// imply, a slot that was free anyway): for those a judge that shares no code with Validate (plan_judge.h)
// decides.

#include <gtest/gtest.h>

#include "annulus/comm/exchange_build.h"
#include "comm/plan_edits.h"
#include "comm/plan_judge.h"

namespace annulus::testing {

struct MutatedKind {
  PlanChoice choice;
  int ranks;
  CaseLayout layout;
  CaseMask mask;
  int64_t heads = 1, kv_heads = 1;
};

inline std::vector<MutatedKind> MutatedKinds() {
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
      {{.kind = PlanKind::kBalanced, .head_split = 2}, 6, kContiguous, CaseMask::kCausal, 2, 1},
      {{.kind = PlanKind::kTokenRing, .head_split = 2}, 6, kZigzag, CaseMask::kCausal, 3, 1},
  };
}

class PlanMutations : public ::testing::Test {
 protected:
  void TearDown() override {
    RecordProperty("refused", refused_);
    RecordProperty("accepted", accepted_);
  }

  // Calls fn with a plan of each kind and pass.
  void OnPlans(const std::function<void()>& fn) {
    for (const MutatedKind& kind : MutatedKinds()) {
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
    if (HasRace(plan)) return "race";
    for (const uint64_t seed : {1, 2}) {
      if (std::string wrong = RunInRandomOrder(made_, plan, seed); !wrong.empty()) return wrong;
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

}  // namespace annulus::testing
