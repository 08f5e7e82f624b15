// What the emulation reports: kernels that are wrong in one way each, and right otherwise.

#include "emulation/block.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_map.h"

namespace annulus::testing {
namespace {

using namespace kernels;

using Tile = SharedTile<64, 64>;
constexpr int kBarrierBytes = 64;
constexpr int kSharedBytes = Tile::kBytes + kBarrierBytes;

// Of one block under the last of several seeds.
template <typename Kernel>
std::string Failure(int threads, Kernel&& kernel) {
  std::string failure;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    emulation::SetSeed(seed);
    const bool ok = emulation::Run({{1, 1, 1}, threads, kSharedBytes, 1}, kernel);
    failure = emulation::LastFailure();
    EXPECT_EQ(ok, failure.empty());
  }
  return failure;
}

uint32_t BarrierAddress() { return SharedAddress(DynamicShared()) + Tile::kBytes; }

void InitBarrier(int count) {
  if (threadIdx.x == 0) PhaseBarrierInit(BarrierAddress(), count);
  __syncthreads();
}

TEST(EmulatedBlock, PhasesFollowEachOther) {
  int order = 0;
  EXPECT_EQ(Failure(64,
                    [&] {
                      InitBarrier(32);
                      if (threadIdx.x == 0) order = 0;
                      for (int phase = 0; phase < 5; ++phase) {
                        if (threadIdx.x < 32) {
                          if (threadIdx.x == 0) ++order;
                          PhaseBarrierArrive(BarrierAddress());
                        } else {
                          PhaseBarrierWait(BarrierAddress(), static_cast<uint32_t>(phase % 2));
                          if (order <= phase) emulation::Fail("a wait that did not wait");
                        }
                        __syncthreads();
                      }
                    }),
            "");
}

TEST(EmulatedBlock, WaitThatNothingEndsIsReported) {
  const std::string failure = Failure(64, [] {
    InitBarrier(32);
    if (threadIdx.x < 31) PhaseBarrierArrive(BarrierAddress());
    if (threadIdx.x >= 32) PhaseBarrierWait(BarrierAddress(), 0);
  });
  EXPECT_NE(failure.find("nothing can go on"), std::string::npos) << failure;
  EXPECT_NE(failure.find("32 threads (32 ... 63) wait for barrier"), std::string::npos) << failure;
}

TEST(EmulatedBlock, ArrivalsBeyondTheCountAreReported) {
  const std::string failure = Failure(32, [] {
    InitBarrier(31);
    if (threadIdx.x == 0) PhaseBarrierExpect(BarrierAddress(), 16);  // holds the phase open
    if (threadIdx.x > 0) PhaseBarrierArrive(BarrierAddress());
  });
  EXPECT_NE(failure.find("more arrivals than its count of 31"), std::string::npos) << failure;
}

TEST(EmulatedBlock, NamedBarrierWithTwoCountsIsReported) {
  const std::string failure = Failure(64, [] { NamedBarrier(1, threadIdx.x < 32 ? 64 : 96); });
  EXPECT_NE(failure.find("named barrier 1: some come with"), std::string::npos) << failure;
}

TEST(EmulatedBlock, LanesInDifferentInstructionsAreReported) {
  const std::string failure = Failure(32, [] {
    if (threadIdx.x < 16) {
      __syncwarp();
    } else {
      __any_sync(~0u, 1);
    }
  });
  EXPECT_NE(failure.find("meet in"), std::string::npos) << failure;
}

TEST(EmulatedBlock, MissingLaneIsReported) {
  const std::string failure = Failure(32, [] {
    if (threadIdx.x > 0) __syncwarp();
  });
  EXPECT_NE(failure.find("31 threads (1 ... 31) wait for __syncwarp"), std::string::npos) << failure;
}

TEST(EmulatedBlock, AccessOutsideOfSharedMemoryIsReported) {
  const std::string failure =
      Failure(32, [] { StoreShared(SharedAddress(DynamicShared()) + kSharedBytes - 2, 1u); });
  EXPECT_NE(failure.find("outside of"), std::string::npos) << failure;
}

TEST(EmulatedBlock, BarrierUsedBeforeItIsInitialisedIsReported) {
  const std::string failure = Failure(32, [] { PhaseBarrierArrive(BarrierAddress()); });
  EXPECT_NE(failure.find("used before it is initialised"), std::string::npos) << failure;
}

// Ordinary writes that the copy engine then stores.
enum class Fence { kNone, kBeforeBarrier };
std::string FailureOfStore(Fence fence) {
  std::vector<__nv_bfloat16> to(64 * 64, __nv_bfloat16{0});
  CUtensorMap map;
  EXPECT_EQ(MakeTensorMap(PanelsRef{to.data(), 64, 1, 1, 64, 64}, 64, 1, &map), cudaSuccess);
  std::string failure = Failure(32, [&] {
    const uint32_t tile = SharedAddress(DynamicShared());
    for (int i = emulation::Lane(); i < Tile::kBytes / 4; i += 32) {
      StoreShared(tile + static_cast<uint32_t>(i * 4), 0x3F803F80u);
    }
    if (fence == Fence::kBeforeBarrier) BulkFence();
    __syncthreads();
    if (threadIdx.x > 0) return;
    StoreTile(map, tile, 0, 0, 0);
    BulkCommit();
    BulkWait();
  });
  if (failure.empty()) {
    for (const __nv_bfloat16 x : to) EXPECT_EQ(x.bits, 0x3F80);
  }
  return failure;
}

TEST(EmulatedBlock, CopyOfUnfencedWritesIsReported) {
  EXPECT_EQ(FailureOfStore(Fence::kBeforeBarrier), "");
  const std::string failure = FailureOfStore(Fence::kNone);
  EXPECT_NE(failure.find("without a fence"), std::string::npos) << failure;
}

}  // namespace
}  // namespace annulus::testing
