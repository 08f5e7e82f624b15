// The emulated copy engine: boxes in the middle and over the edges of a tensor.

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/common/hopper.cuh"
#include "kernels/common/hopper_add.cuh"
#include "kernels/common/tensor_map.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kRows = 70, kBatch = 2, kPanels = 3, kRowStride = 2 * 3 * 64 + 16,
                  kBatchStride = 3 * 64 + 8;
constexpr int kBoxRows = 16, kBoxPanels = 2;
constexpr uint32_t kTile = 1024, kBarrier = kTile + 2 * kBoxRows * 128;
constexpr int64_t kSharedBytes = 8192;

// Where 4-byte words of a box's row lie.
uint32_t Word(int row, int panel, int word) {
  const auto chunk = static_cast<uint32_t>(word / 4 ^ row % 8);
  return kTile + static_cast<uint32_t>((panel * kBoxRows + row) * 128) + chunk * 16 +
         static_cast<uint32_t>(word % 4 * 4);
}

struct Corner {
  int row, panel, item;
};
constexpr Corner kCorners[] = {{0, 0, 0}, {24, 1, 1}, {60, 0, 1}, {69, 2, 0}};

TEST(EmulatedTensors, BoxesAreLoadedWithZerosOutside) {
  std::vector<__nv_bfloat16> data(static_cast<size_t>(kRows * kRowStride));
  const auto value = [](int64_t row, int64_t item, int64_t column) {
    return static_cast<float>((row * 3 + item * 5 + column) % 200 + 1);
  };
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t item = 0; item < kBatch; ++item) {
      for (int64_t column = 0; column < kPanels * 64; ++column) {
        data[static_cast<size_t>(row * kRowStride + item * kBatchStride + column)] =
            __float2bfloat16(value(row, item, column));
      }
    }
  }
  CUtensorMap map;
  ASSERT_EQ(MakeTensorMap(PanelsRef{data.data(), kRows, kBatch, kPanels, kRowStride, kBatchStride}, kBoxRows,
                          kBoxPanels, &map),
            cudaSuccess);
  for (const Corner& at : kCorners) {
    int wrong = 0;
    EXPECT_TRUE(emulation::Run({{1, 1, 1}, 32, kSharedBytes, 1}, [&] {
      if (threadIdx.x == 0) {
        PhaseBarrierInit(kBarrier, 1);
        PhaseBarrierExpect(kBarrier, kBoxPanels * kBoxRows * 128);
        LoadTile(kTile, map, kBarrier, at.row, at.panel, at.item);
      }
      __syncwarp();
      PhaseBarrierWait(kBarrier, 0);
      if (threadIdx.x > 0) return;
      for (int panel = 0; panel < kBoxPanels; ++panel) {
        for (int row = 0; row < kBoxRows; ++row) {
          for (int column = 0; column < 64; column += 2) {
            const bool inside = at.row + row < kRows && at.panel + panel < kPanels;
            const auto want = [&](int c) {
              return inside ? value(at.row + row, at.item, (at.panel + panel) * 64 + c) : 0;
            };
            uint32_t got;
            std::memcpy(&got, emulation::SharedAt(Word(row, panel, column / 2), 4), 4);
            wrong += got != PackBf16(want(column), want(column + 1));
          }
        }
      }
    })) << emulation::LastFailure();
    EXPECT_EQ(wrong, 0) << at.row << " " << at.panel << " " << at.item;
  }
}

// Sums of a tile whose words count up from 1, the fence left out or not.
enum class Fence { kYes, kNo };
bool AddOnce(const CUtensorMap& map, const Corner& at, Fence fence) {
  return emulation::Run({{1, 1, 1}, 32, kSharedBytes, 1}, [&] {
    if (threadIdx.x > 0) return;
    for (int panel = 0; panel < kBoxPanels; ++panel) {
      for (int row = 0; row < kBoxRows; ++row) {
        for (int word = 0; word < 32; word += 2) {
          const auto first = static_cast<float>((panel * kBoxRows + row) * 32 + word + 1);
          StoreShared(Word(row, panel, word), first, first + 1);
        }
      }
    }
    if (fence == Fence::kYes) BulkFence();
    AddTile(map, kTile, at.row, at.panel, at.item);
    BulkCommit();
    BulkWaitRead();
    StoreShared(kTile, NAN, NAN);  // the tile is free
    BulkWait();
  });
}

TEST(EmulatedTensors, BoxesAreAddedInsideOnly) {
  for (const Corner& at : kCorners) {
    std::vector<float> data(static_cast<size_t>(kRows * kRowStride), 0.5f);
    CUtensorMap map;
    ASSERT_EQ(MakeTensorMap(SumPanelsRef{data.data(), kRows, kBatch, kPanels, kRowStride, kBatchStride},
                            kBoxRows, kBoxPanels, &map),
              cudaSuccess);
    ASSERT_TRUE(AddOnce(map, at, Fence::kYes)) << emulation::LastFailure();
    ASSERT_TRUE(AddOnce(map, at, Fence::kYes)) << emulation::LastFailure();
    std::vector<float> want(data.size(), 0.5f);
    for (int panel = 0; panel < kBoxPanels; ++panel) {
      for (int row = 0; row < kBoxRows; ++row) {
        if (at.row + row >= kRows || at.panel + panel >= kPanels) continue;
        for (int word = 0; word < 32; ++word) {
          want[static_cast<size_t>((at.row + row) * kRowStride + at.item * kBatchStride +
                                   (at.panel + panel) * 32 + word)] +=
              2 * static_cast<float>((panel * kBoxRows + row) * 32 + word + 1);
        }
      }
    }
    EXPECT_EQ(data, want) << at.row << " " << at.panel << " " << at.item;
  }
}

TEST(EmulatedTensors, SumsOfUnfencedTilesAreFound) {
  std::vector<float> data(static_cast<size_t>(kRows * kRowStride), 0);
  CUtensorMap map;
  ASSERT_EQ(MakeTensorMap(SumPanelsRef{data.data(), kRows, kBatch, kPanels, kRowStride, kBatchStride},
                          kBoxRows, kBoxPanels, &map),
            cudaSuccess);
  EXPECT_FALSE(AddOnce(map, {0, 0, 0}, Fence::kNo));
  EXPECT_NE(emulation::LastFailure().find("copy out of shared memory"), std::string::npos)
      << emulation::LastFailure();
}

TEST(EmulatedTensors, MapsThatTheDriverRefusesAreRefused) {
  std::vector<float> data(1024);
  CUtensorMap map;
  EXPECT_EQ(MakeTensorMap(SumPanelsRef{data.data(), 4, 1, 1, 33, 0}, 4, 1, &map), cudaErrorInvalidValue);
  EXPECT_EQ(MakeTensorMap(SumPanelsRef{data.data(), 4, 1, 1, 32, 0}, 300, 1, &map), cudaErrorInvalidValue);
  EXPECT_EQ(MakeTensorMap(SumPanelsRef{data.data() + 1, 4, 1, 1, 32, 0}, 4, 1, &map), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace annulus::kernels
