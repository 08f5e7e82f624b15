// ranks: 2
// Keys that never come end a kernel that waits for them, and what is said names rank, step and message. The
// kernel takes the process's context on the GPU with it: this program has no other test, and frees nothing.

#include <chrono>
#include <thread>

#include "annulus/device/wait_reports.h"
#include "gpu/exchange_rank.h"
#include "parallel/every_plan.h"

namespace annulus::testing {
namespace {

using Clock = std::chrono::steady_clock;

TEST(Arena, GivesUpKeysThatNeverCome) {
  auto& gpu = *new GpuRank;
  ASSERT_TRUE(RunsHopperKernels(gpu.ctx.device)) << "no kernel takes keys as they come";
  const auto& judged = JudgedLayerOf<BFloat16>(kLayerKinds[0], gpu.cp.size(), BlockGradients::kRounded);
  auto& layer = *new LayerOnRank<BFloat16>(gpu.ctx, judged, gpu.cp.rank());
  const PlanChoice arena{.kind = PlanKind::kArena};
  auto& geometry = *new AttentionGeometry(judged.layout, gpu.cp,
                                          {.forward = {arena},
                                           .backward = {arena},
                                           .transport = TransportKind::kCopyEngine,
                                           .patience_seconds = 2});
  geometry.SetBatch(judged.sequences);
  EXPECT_TRUE(judged.Refused(layer.Run(geometry, judged.shape)).empty());
  ExchangeTransport* transport = geometry.Transport(gpu.ctx, TransportKind::kCopyEngine).value();
  EXPECT_TRUE(transport->Health().ok());

  if (gpu.cp.rank() == 0) {
    const Clock::time_point begin = Clock::now();
    layer.Forward(geometry, judged.shape);
    while (transport->Health().ok() && Clock::now() - begin < std::chrono::seconds(20))
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    const std::string said = transport->Health().ToString();
    std::printf("%s\n", said.c_str());
    EXPECT_GE(Clock::now() - begin, std::chrono::seconds(2));
    for (const char* part : {"a kernel gave up: waited ", "rank 0 step ", "(receive kv of block 1 rows ",
                             " from rank 1, message ", "its flag is "}) {
      EXPECT_NE(said.find(part), std::string::npos) << part << " in " << said;
    }
    // Any call that needs the device fails by it, and says so.
    const absl::Status after = MemoryOfGpu().status();
    EXPECT_FALSE(after.ok());
    EXPECT_NE(after.ToString().find(WhyKernelsGaveUp()), std::string::npos) << after;
  }
  EXPECT_TRUE(World().Barrier().ok());
}

}  // namespace
}  // namespace annulus::testing
