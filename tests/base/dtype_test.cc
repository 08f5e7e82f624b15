#include "annulus/base/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

namespace annulus {
namespace {

float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

TEST(DType, NamesAndSizes) {
  EXPECT_EQ(Name(DType::kBF16), "bf16");
  EXPECT_EQ(SizeOf(DType::kBF16), 2);
  EXPECT_EQ(SizeOf(DType::kBF16), static_cast<int64_t>(sizeof(BFloat16)));
  EXPECT_EQ(DTypeOf<BFloat16>(), DType::kBF16);
  EXPECT_EQ(DTypeOf<const BFloat16>(), DType::kBF16);
  EXPECT_EQ(AccumOf(DType::kBF16), DType::kF32);
  for (const DType dtype : {DType::kF32, DType::kF64, DType::kBF16, DType::kI32, DType::kI64, DType::kU8}) {
    EXPECT_NE(Name(dtype), "unknown");
    EXPECT_GT(SizeOf(dtype), 0);
  }
}

TEST(DTypeDeathTest, HostsDoNotComputeInBf16) {
  EXPECT_DEATH(VisitFloat(DType::kBF16, []<class T>() {}), "dtype bf16");
}

// Sign, exponent and fraction by their definition.
double ValueOf(uint16_t bits) {
  const int exponent = (bits >> 7) & 0xff, fraction = bits & 0x7f;
  const double sign = (bits >> 15) != 0 ? -1 : 1;
  if (exponent == 0) return sign * std::ldexp(fraction, -126 - 7);
  return sign * std::ldexp(128 + fraction, exponent - 127 - 7);
}

bool IsFinite(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

TEST(BFloat16, EveryPatternHasItsValueAndReturns) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const BFloat16 x{static_cast<uint16_t>(i)};
    const float value = ToFloat(x);
    if (IsFinite(x.bits)) {
      ASSERT_EQ(static_cast<double>(value), ValueOf(x.bits)) << i;
      ASSERT_EQ(std::signbit(value), (i >> 15) != 0) << i;
      ASSERT_EQ(ToBFloat16(value), x) << i;
    } else if ((i & 0x7f) == 0) {
      ASSERT_TRUE(std::isinf(value)) << i;
      ASSERT_EQ(ToBFloat16(value), x) << i;
    } else {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_TRUE(std::isnan(ToFloat(ToBFloat16(value)))) << i;
      ASSERT_EQ(ToBFloat16(value).bits, i | 0x40) << i;
    }
  }
}

// Between each pattern and the next one away from zero: the tie goes to the even one, its neighbours to the
// nearer. Beyond the largest finite pattern "the next" is infinity, as IEEE 754 rounds.
TEST(BFloat16, RoundsToNearestAndTiesToEven) {
  for (uint32_t i = 0; i < 65536; ++i) {
    if (!IsFinite(static_cast<uint16_t>(i))) continue;
    const uint16_t below = static_cast<uint16_t>(i), above = static_cast<uint16_t>(i + 1);
    const uint16_t even = below % 2 == 0 ? below : above;
    const uint32_t bits = i << 16;
    ASSERT_EQ(ToBFloat16(FromBits(bits | 0x0001)).bits, below) << i;
    ASSERT_EQ(ToBFloat16(FromBits(bits | 0x7fff)).bits, below) << i;
    ASSERT_EQ(ToBFloat16(FromBits(bits | 0x8000)).bits, even) << i;
    ASSERT_EQ(ToBFloat16(FromBits(bits | 0x8001)).bits, above) << i;
    ASSERT_EQ(ToBFloat16(FromBits(bits | 0xffff)).bits, above) << i;
  }
  EXPECT_TRUE(std::isinf(ToFloat(ToBFloat16(std::numeric_limits<float>::max()))));
}

TEST(BFloat16, ANanOfTheLowerHalfStaysOne) {
  for (const uint32_t sign : {0u, 0x80000000u}) {
    for (const uint32_t payload : {0x0001u, 0x7fffu, 0x8000u, 0xffffu}) {
      EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(FromBits(sign | 0x7f800000u | payload))))) << payload;
    }
  }
}

}  // namespace
}  // namespace annulus
