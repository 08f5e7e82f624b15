// ranks: 2 3 4
// Attention in f32 by every exchange plan between processes follows the rule of tolerance, as it must in bf16
// on GPUs (gpu/attention_plans_mpi_test.cc).

#include "parallel/every_plan.h"
#include "support/mpi_main.h"

namespace annulus::testing {
namespace {

TEST(EveryPlan, IsOfEveryKind) {
  std::set<PlanKind> kinds;
  for (const PlanChoice& choice : EveryPlan(4)) kinds.insert(choice.kind);
  EXPECT_EQ(kinds.size(), static_cast<size_t>(kPlanKinds));
}

TEST(EveryPlan, FollowsTheRule) {
  Context ctx{Device{}};
  ExpectEveryPlan<float>(ctx, World(), {TransportKind::kHost}, BlockGradients::kSummed);
}

TEST(EveryPlan, MayNotLoseKeys) {
  Context ctx{Device{}};
  ExpectMissingKeysAreRefused<float>(ctx, World(), TransportKind::kHost, BlockGradients::kSummed);
}

}  // namespace
}  // namespace annulus::testing
