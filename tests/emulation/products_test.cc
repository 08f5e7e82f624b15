// Emulated products against naive loops, with small integers, which bf16 holds and sums exactly.

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "kernels/common/hopper.cuh"

namespace annulus::kernels {
namespace {

constexpr int kRows = 64, kColumns = 128, kDepth = 64, kGroup = 128;
constexpr uint32_t kLeftTile = 1024, kRightTile = kLeftTile + 2 * 16384;
constexpr int64_t kSharedBytes = 5 * 16384;

float Left(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); }
float Right(int column, int k) { return static_cast<float>((column * 5 + k * 2) % 13 - 6); }
float Want(int row, int column) {
  float sum = 0;
  for (int k = 0; k < kDepth; ++k) sum += Left(row, k) * Right(column, k);
  return sum;
}

// Element (row, column) of a SharedTile of `rows` rows.
void Put(uint32_t tile, int rows, int row, int column, float value) {
  const auto chunk = static_cast<uint32_t>(column % 64 / 8 ^ row % 8);
  const uint32_t address = tile + static_cast<uint32_t>(column / 64 * rows * 128 + row * 128) + chunk * 16 +
                           static_cast<uint32_t>(column % 8 * 2);
  const uint32_t bits = PackBf16(value, 0);
  std::memcpy(emulation::SharedAt(address, 2), &bits, 2);
  emulation::WroteShared(address / 16 * 16, 16);
}

// Tiles by thread 0, which fences them.
template <Major kLeft, Major kRight>
void FillTiles() {
  if (threadIdx.x != 0) return;
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < kRows; ++row) {
      kLeft == Major::kDepthInRow ? Put(kLeftTile, kRows, row, k, Left(row, k))
                                  : Put(kLeftTile, kDepth, k, row, Left(row, k));
    }
    for (int column = 0; column < kColumns; ++column) {
      kRight == Major::kDepthInRow ? Put(kRightTile, kColumns, column, k, Right(column, k))
                                   : Put(kRightTile, kDepth, k, column, Right(column, k));
    }
  }
}

template <Major kMajor, int kTileRows>
uint64_t Operand(uint32_t tile, int k) {
  return kMajor == Major::kDepthInRow ? OperandAt<kTileRows>(tile, 0, k / 8) : OperandAt<kDepth>(tile, k, 0);
}

using Sums = float[kColumns / 8][4];

template <Major kLeft, Major kRight>
void StartAll(Sums& c) {
  GroupFence();
  for (int k = 0; k < kDepth; k += 16) {
    MultiplyShared<kLeft, kRight>(c, Operand<kLeft, kRows>(kLeftTile, k),
                                  Operand<kRight, kColumns>(kRightTile, k), k > 0);
  }
  GroupCommit();
}

template <Major kRight>
void StartRegisters(Sums& c) {
  const int lane = static_cast<int>(threadIdx.x % 32),
            row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  GroupFence();
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) {
      const int at = k + lane % 4 * 2 + i / 2 * 8;
      a[i] = PackBf16(Left(row + i % 2 * 8, at), Left(row + i % 2 * 8, at + 1));
    }
    MultiplyRegisters<kRight>(c, a, Operand<kRight, kColumns>(kRightTile, k), k > 0);
  }
  GroupCommit();
}

int Wrong(const Sums& c) {
  const int lane = static_cast<int>(threadIdx.x % 32),
            row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  int wrong = 0;
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) wrong += c[n][i] != Want(row + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2);
  }
  return wrong;
}

bool RunGroup(const std::function<void()>& kernel) {
  return emulation::Run({{1, 1, 1}, kGroup, kSharedBytes, 1}, kernel);
}

template <Major kLeft, Major kRight>
void CheckLayouts() {
  int wrong = 0;
  EXPECT_TRUE(RunGroup([&] {
    FillTiles<kLeft, kRight>();
    BulkFence();
    __syncthreads();
    Sums c, from_registers;
    StartAll<kLeft, kRight>(c);
    StartRegisters<kRight>(from_registers);
    GroupWait<0>();
    wrong += Wrong(c) + Wrong(from_registers);
  })) << emulation::LastFailure();
  EXPECT_EQ(wrong, 0);
}

TEST(EmulatedProducts, LayoutsOfBothOperands) {
  CheckLayouts<Major::kDepthInRow, Major::kDepthInRow>();
  CheckLayouts<Major::kDepthInRow, Major::kDepthAcrossRows>();
  CheckLayouts<Major::kDepthAcrossRows, Major::kDepthInRow>();
  CheckLayouts<Major::kDepthAcrossRows, Major::kDepthAcrossRows>();
}

TEST(EmulatedProducts, SumsAreThereAfterTheWaitForTheirGroupOnly) {
  constexpr Major kIn = Major::kDepthInRow;
  int early = 0, wrong = 0;
  EXPECT_TRUE(RunGroup([&] {
    FillTiles<kIn, kIn>();
    BulkFence();
    __syncthreads();
    Sums first, second;
    StartAll<kIn, kIn>(first);
    StartAll<kIn, kIn>(second);
    GroupWait<1>();
    wrong += Wrong(first);
    early += !std::isnan(second[0][0]);
    GroupWait<0>();
    wrong += Wrong(second);
  })) << emulation::LastFailure();
  EXPECT_EQ(early, 0);
  EXPECT_EQ(wrong, 0);
}

TEST(EmulatedProducts, WritesWithoutFenceAreFound) {
  constexpr Major kIn = Major::kDepthInRow;
  EXPECT_FALSE(RunGroup([&] {
    FillTiles<kIn, kIn>();
    __syncthreads();
    Sums c;
    StartAll<kIn, kIn>(c);
    GroupWait<0>();
  }));
  EXPECT_NE(emulation::LastFailure().find("product"), std::string::npos) << emulation::LastFailure();
}

// A tile that is overwritten while a product may still read it gives another result in some order.
TEST(EmulatedProducts, TilesReusedTooEarlyAreSeen) {
  constexpr Major kIn = Major::kDepthInRow;
  bool seen = false;
  for (uint32_t seed = 0; seed < 20 && !seen; ++seed) {
    emulation::SetSeed(seed);
    int wrong = 0;
    RunGroup([&] {
      FillTiles<kIn, kIn>();
      BulkFence();
      __syncthreads();
      Sums c;
      StartAll<kIn, kIn>(c);
      if (threadIdx.x == 0) Put(kRightTile, kColumns, 0, 0, 100);
      BulkFence();
      GroupWait<0>();
      wrong += Wrong(c);
    });
    seen = wrong > 0;
  }
  EXPECT_TRUE(seen);
}

TEST(EmulatedMatrices, StoredAndLoaded) {
  int wrong = 0;
  EXPECT_TRUE(emulation::Run({{1, 1, 1}, 32, 4096, 1}, [&] {
    // Matrix i holds 64 i + 8 row + column; its rows lie one after the other.
    const int lane = static_cast<int>(threadIdx.x), row = lane / 4, column = lane % 4 * 2;
    uint32_t r[4], transposed[4];
    for (int i = 0; i < 4; ++i) {
      const auto at = static_cast<float>(64 * i + 8 * row + column);
      r[i] = PackBf16(at, at + 1);
      transposed[i] = PackBf16(static_cast<float>(64 * i + 8 * column + row),
                               static_cast<float>(64 * i + 8 * (column + 1) + row));
    }
    const uint32_t address = 1024 + static_cast<uint32_t>(lane * 16);
    for (const bool across : {false, true}) {
      across ? StoreMatricesTransposed(address, transposed) : StoreMatrices(address, r);
      __syncwarp();
      uint32_t got[4], got_transposed[4];
      LoadMatrices(got, address);
      LoadMatricesTransposed(got_transposed, address);
      for (int i = 0; i < 4; ++i) {
        wrong += got[i] != r[i];
        wrong += got_transposed[i] != transposed[i];
      }
      uint32_t first;
      std::memcpy(&first, emulation::SharedAt(address, 4), 4);
      wrong += first != PackBf16(static_cast<float>(8 * lane), static_cast<float>(8 * lane + 1));
      __syncwarp();
    }
  })) << emulation::LastFailure();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace annulus::kernels
