#include "annulus/base/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace annulus {
namespace {

using Block = std::array<uint32_t, 4>;

// Known answers that come with the paper's own implementation (Random123, kat_vectors: philox4x32 10).
TEST(Philox, KnownAnswers) {
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(Philox({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, DependsOnSeedStreamAndIndexOnly) {
  const RandomStream a(7, "init"), same(7, "init"), other_seed(8, "init"), other_stream(7, "data");
  const RandomStream high_seed(7 + (uint64_t{1} << 32), "init");
  for (const uint64_t index : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 40}) {
    EXPECT_EQ(a.Bits(index), same.Bits(index));
    EXPECT_NE(a.Bits(index), other_seed.Bits(index));
    EXPECT_NE(a.Bits(index), other_stream.Bits(index));
    EXPECT_NE(a.Bits(index), high_seed.Bits(index));
  }
  EXPECT_NE(a.Bits(1), a.Bits(1 + (uint64_t{1} << 32)));
}

// Sample moments against their standard errors: 5 of them is exceeded once in 1.7 million seeds.
TEST(RandomStream, UniformMoments) {
  constexpr int kCount = 200'000;
  const RandomStream random(1, "uniform");
  double sum = 0, squares = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    const double u = random.Uniform(i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / kCount, 0.5, 5 * std::sqrt(1.0 / 12 / kCount));
  EXPECT_NEAR(squares / kCount, 1.0 / 3, 5 * std::sqrt((1.0 / 5 - 1.0 / 9) / kCount));
}

TEST(RandomStream, NormalMoments) {
  constexpr int kCount = 200'000;
  const RandomStream random(1, "normal");
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, lag = 0, before = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    const double x = random.Normal(i);
    ASSERT_TRUE(std::isfinite(x));
    m1 += x;
    m2 += x * x;
    m3 += x * x * x;
    m4 += x * x * x * x;
    lag += x * before;
    before = x;
  }
  // Variances of the powers of a standard normal: 1, 2, 15, 96; of the product of two: 1.
  EXPECT_NEAR(m1 / kCount, 0.0, 5 * std::sqrt(1.0 / kCount));
  EXPECT_NEAR(m2 / kCount, 1.0, 5 * std::sqrt(2.0 / kCount));
  EXPECT_NEAR(m3 / kCount, 0.0, 5 * std::sqrt(15.0 / kCount));
  EXPECT_NEAR(m4 / kCount, 3.0, 5 * std::sqrt(96.0 / kCount));
  EXPECT_NEAR(lag / kCount, 0.0, 5 * std::sqrt(1.0 / kCount));
}

TEST(RandomStream, BelowCoversItsRangeEvenly) {
  constexpr int kCount = 70'000, kValues = 7;
  const RandomStream random(3, "below");
  std::vector<int> counts(kValues);
  for (uint64_t i = 0; i < kCount; ++i) {
    const uint64_t value = random.Below(i, kValues);
    ASSERT_LT(value, uint64_t{kValues});
    ++counts[value];
    EXPECT_EQ(random.Below(i, 1), 0u);
  }
  const double p = 1.0 / kValues;
  for (const int count : counts) EXPECT_NEAR(count, kCount * p, 5 * std::sqrt(kCount * p * (1 - p)));
  EXPECT_LT(random.Below(0, ~uint64_t{0}), ~uint64_t{0});
}

TEST(Permutation, IsBijective) {
  for (uint64_t n = 1; n <= 200; ++n) {
    const Permutation permutation(n, n, "order");
    std::vector<bool> seen(n);
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t at = permutation(i);
      ASSERT_LT(at, n);
      ASSERT_FALSE(seen[at]) << "n " << n << ": " << at << " twice";
      seen[at] = true;
    }
  }
}

TEST(Permutation, IsBijectiveAroundPowersOfTwo) {
  for (const uint64_t n : {65'535, 65'536, 65'537, 100'003, 262'145}) {
    const Permutation permutation(n, 5, "order");
    std::vector<bool> seen(n);
    for (uint64_t i = 0; i < n; ++i) seen.at(permutation(i)) = true;
    for (uint64_t i = 0; i < n; ++i) ASSERT_TRUE(seen[i]) << "n " << n << ": " << i << " is never reached";
  }
}

TEST(Permutation, LargestSize) {
  const uint64_t n = uint64_t{1} << 62;
  const Permutation permutation(n, 5, "order");
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < 1000; ++i) {
    seen.insert(permutation(i));
    seen.insert(permutation(n - 1 - i));
  }
  EXPECT_EQ(seen.size(), 2000u);
  EXPECT_LT(*seen.rbegin(), n);
}

TEST(Permutation, DependsOnSeedAndMixes) {
  constexpr uint64_t kSize = 10'000;
  const Permutation a(kSize, 1, "order"), b(kSize, 2, "order");
  uint64_t equal = 0, fixed = 0;
  for (uint64_t i = 0; i < kSize; ++i) {
    equal += a(i) == b(i);
    fixed += a(i) == i;
  }
  // Both counts are close to Poisson with mean 1; 12 or more has probability below 1e-9.
  EXPECT_LT(equal, 12u);
  EXPECT_LT(fixed, 12u);
}

TEST(PermutationDeathTest, ChecksItsArguments) {
  EXPECT_DEATH(Permutation(0, 1, "order"), "n 0");
  const Permutation three(3, 1, "order");
  EXPECT_DEATH(three(3), "3 of 3");
}

}  // namespace
}  // namespace annulus
