// ranks: 2 3 4
// Attention in bf16 on the kernels that models use, by every exchange plan and every transport that this
// machine offers, forward and backward, against f64. Ranks may share a GPU.

#include "gpu/exchange_rank.h"
#include "parallel/every_plan.h"

namespace annulus::testing {
namespace {

TEST(GpuAttentionPlans, FollowTheRule) {
  GpuRank gpu;
  ExpectEveryPlan<BFloat16>(gpu.ctx, gpu.cp, gpu.Transports(), BlockGradients::kRounded);
}

// By our own kernels; by the best transport.
TEST(GpuAttentionPlans, FollowTheRuleDeterministic) {
  GpuRank gpu(Determinism::kRequired);
  ExpectEveryPlan<BFloat16>(gpu.ctx, gpu.cp, {gpu.Transports().back()}, BlockGradients::kSummed);
}

TEST(GpuAttentionPlans, MayNotLoseKeys) {
  GpuRank gpu;
  ExpectMissingKeysAreRefused<BFloat16>(gpu.ctx, gpu.cp, gpu.Transports().back(), BlockGradients::kRounded);
}

}  // namespace
}  // namespace annulus::testing
