#include "annulus/device/buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace annulus {
namespace {

bool AllBytesAre(const void* data, int64_t bytes, uint8_t value) {
  const uint8_t* begin = static_cast<const uint8_t*>(data);
  return std::all_of(begin, begin + bytes, [&](uint8_t b) { return b == value; });
}

bool Aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(kAlignmentBytes) == 0;
}

TEST(Buffer, IsZeroedAlignedAndMoves) {
  Buffer a(Device{}, 1000);
  ASSERT_TRUE(AllBytesAre(a.data(), 1000, 0));
  EXPECT_TRUE(Aligned(a.data()));
  void* data = a.data();
  Buffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(b.bytes(), 1000);
  EXPECT_EQ(a.data(), nullptr);  // NOLINT: moved-from is empty
  EXPECT_EQ(a.bytes(), 0);
  Buffer c;
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(Buffer(Device{}, 0).data(), nullptr);
}

TEST(BufferDeathTest, RefusesNegativeSizes) {
  EXPECT_DEATH(Buffer(Device{}, -1), "bytes >= 0");
  EXPECT_DEATH(PinnedBuffer(Device{}, -1), "bytes >= 0");
}

TEST(BufferDeathTest, MemoryThatIsNotThereEndsTheJob) {
  EXPECT_DEATH(Buffer(Device{}, int64_t{1} << 60),
               "out of memory: 1152921504606846976 bytes on cpu, [0-9]+ are free|"
               "allocation-size-too-big");  // AddressSanitizer's words, where it answers first
}

TEST(PinnedBuffer, IsAlignedAndMoves) {
  PinnedBuffer a(Device{}, 1000);
  EXPECT_TRUE(Aligned(a.data()));
  std::memset(a.data(), 7, 1000);
  void* data = a.data();
  PinnedBuffer b(std::move(a));
  EXPECT_EQ(a.data(), nullptr);  // NOLINT: moved-from is empty
  EXPECT_EQ(a.bytes(), 0);
  PinnedBuffer c;
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.bytes(), 1000);
  EXPECT_TRUE(AllBytesAre(c.data(), 1000, 7));
  EXPECT_EQ(PinnedBuffer(Device{}, 0).data(), nullptr);
}

TEST(Tensor, OwnsItsElements) {
  const Tensor tensor(Device{}, DType::kF64, Shape({3, 2}));
  EXPECT_EQ(tensor.ref().bytes(), 48);
  EXPECT_EQ(tensor.ref().dtype(), DType::kF64);
  EXPECT_TRUE(AllBytesAre(tensor.ref().raw(), 48, 0));
  EXPECT_EQ(Tensor(Device{}, DType::kF32, Shape({0, 7})).ref().elements(), 0);
}

TEST(Arena, AllocationsAreAlignedAndDisjoint) {
  Arena arena(Device{});
  std::vector<TensorRef> tensors;
  for (const int64_t elements : {1, 0, 63, 64, 65, 1000, 3'000'000, 5'000'000, 2}) {
    tensors.push_back(arena.Allocate(DType::kF32, Shape({elements})));
    EXPECT_TRUE(Aligned(tensors.back().raw()));
    std::memset(tensors.back().raw(), static_cast<int>(tensors.size()),
                static_cast<size_t>(tensors.back().bytes()));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_TRUE(AllBytesAre(tensors[i].raw(), tensors[i].bytes(), static_cast<uint8_t>(i + 1))) << i;
    for (size_t j = 0; j < i; ++j) EXPECT_NE(tensors[i].raw(), tensors[j].raw());
  }
}

TEST(Arena, RepeatingAStepAllocatesNothing) {
  Arena arena(Device{});
  const auto step = [&] {
    const ArenaScope scope(arena);
    std::vector<void*> at;
    at.push_back(arena.Allocate(DType::kF32, Shape({1'000'000})).raw());
    for (int i = 0; i < 3; ++i) {
      const ArenaScope inner(arena);
      at.push_back(arena.Allocate(DType::kF64, Shape({4'000'000})).raw());
    }
    at.push_back(arena.Allocate(DType::kU8, Shape({17})).raw());
    return at;
  };
  const std::vector<void*> first = step();
  EXPECT_EQ(first[1], first[2]);
  EXPECT_EQ(first[1], first[3]);
  const int64_t capacity = arena.capacity_bytes(), high_water = arena.high_water_bytes();
  EXPECT_GE(capacity, 36'000'000);
  EXPECT_GE(high_water, 36'000'000);
  EXPECT_EQ(arena.used_bytes(), 0);
  for (int repeat = 0; repeat < 3; ++repeat) EXPECT_EQ(step(), first);
  EXPECT_EQ(arena.capacity_bytes(), capacity);
  EXPECT_EQ(arena.high_water_bytes(), high_water);
}

TEST(Arena, MarkAndReleaseReuseMemory) {
  Arena arena(Device{});
  arena.Allocate(DType::kF32, Shape({10}));
  const Arena::Position mark = arena.Mark();
  const int64_t used = arena.used_bytes();
  const TensorRef a = arena.Allocate(DType::kF32, Shape({10}));
  std::memset(a.raw(), 0xff, static_cast<size_t>(a.bytes()));
  EXPECT_GT(arena.used_bytes(), used);
  arena.Release(mark);
  EXPECT_EQ(arena.used_bytes(), used);
  EXPECT_EQ(arena.Allocate(DType::kF32, Shape({10})).raw(), a.raw());
}

}  // namespace
}  // namespace annulus
