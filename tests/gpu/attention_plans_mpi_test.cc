// ranks: 2 3 4
// Attention in bf16 on the kernels that models use, by every exchange plan and every transport that this
// machine offers, forward and backward, against f64. Ranks may share a GPU.

#include <chrono>
#include <thread>

#include "annulus/base/random.h"
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

// Ranks begin at times of their own, so that keys come before, while and after a rank computes on others. Of
// `full` thread blocks of two ranks hold all multiprocessors of an H200.
TEST(GpuAttentionPlans, KeysMayComeInAnyOrder) {
  constexpr uint64_t kRepeats = 12, kMostMs = 20;
  GpuRank gpu;
  const LayerKind full = {"full", LayoutKind::kZigzag, 400 / gpu.cp.size(), 17,
                          0,      Documents::kNone,    Lengths::kFull,      64};
  const RandomStream delays(7, absl::StrCat("delays of rank ", gpu.cp.rank()));
  const auto transports = std::make_shared<ExchangeTransports>(gpu.cp, LinkThrottle());
  const TransportKind transport = gpu.Transports().back();
  std::vector<LayerKind> kinds(std::begin(kLayerKinds), std::end(kLayerKinds));
  kinds.push_back(full);
  for (const LayerKind& kind : kinds) {
    const auto& judged = JudgedLayerOf<BFloat16>(kind, gpu.cp.size(), BlockGradients::kRounded);
    LayerOnRank<BFloat16> layer(gpu.ctx, judged, gpu.cp.rank());
    for (const int parts : {1, 2}) {
      const PlanChoice choice{.kind = PlanKind::kArena, .parts = parts};
      AttentionGeometry geometry(
          judged.layout, gpu.cp,
          {.forward = {choice}, .backward = {choice}, .transport = transport, .patience_seconds = 20},
          transports);
      geometry.SetBatch(judged.sequences);
      const auto schedule = geometry.ScheduleFor(gpu.ctx, judged.shape, DType::kBF16, Pass::kForward).value();
      const bool can = transport == TransportKind::kCopyEngine && RunsHopperKernels(gpu.ctx.device);
      EXPECT_EQ(schedule->arriving.size(), can ? 1u : 0u);
      for (uint64_t repeat = 0; repeat < kRepeats; ++repeat) {
        std::this_thread::sleep_for(std::chrono::milliseconds(delays.Below(repeat, kMostMs)));
        const auto refused = judged.Refused(layer.Run(geometry, judged.shape));
        EXPECT_TRUE(refused.empty()) << ::testing::PrintToString(refused) << "\n"
                                     << kind.name << ", " << parts << " parts, repeat " << repeat;
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
