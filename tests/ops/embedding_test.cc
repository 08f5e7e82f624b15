#include "annulus/ops/embedding.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

template <typename T>
class EmbeddingTest : public ::testing::Test {};
TYPED_TEST_SUITE(EmbeddingTest, FloatTypes);

TYPED_TEST(EmbeddingTest, GathersRows) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t d : {0, 1, 16, 33}) {
    const std::vector<int32_t> tokens = {4, 0, 4, 2};
    Guarded<int32_t> ids({4}, tokens);
    Guarded<T> table({5, d}, NormalValues<T>(5 * d, "table")), y({4, d});
    ANNULUS_CHECK_OK(EmbeddingForward(ctx, ids.ref(), table.ref(), y.ref()));
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t i = 0; i < d; ++i) {
        EXPECT_EQ(y.values()[reference::At(t, i, d)],
                  table.values()[reference::At(tokens[static_cast<size_t>(t)], i, d)]);
      }
    }
  }
}

// Rows of a table that another rank holds: zeros, and no gradient.
TYPED_TEST(EmbeddingTest, NegativeTokensAreOfAnotherRank) {
  using T = TypeParam;
  Context ctx{Device{}};
  constexpr int64_t kD = 3;
  Guarded<int32_t> ids({4}, {-1, 1, std::numeric_limits<int32_t>::min(), 0});
  Guarded<T> table({2, kD}, NormalValues<T>(2 * kD, "table")), y({4, kD});
  ANNULUS_CHECK_OK(EmbeddingForward(ctx, ids.ref(), table.ref(), y.ref()));
  std::vector<T> expected(4 * kD);
  std::copy_n(table.values().begin() + kD, kD, expected.begin() + kD);
  std::copy_n(table.values().begin(), kD, expected.begin() + 3 * kD);
  EXPECT_EQ(y.values(), expected);

  const auto dy_values = NormalValues<T>(4 * kD, "dy");
  Guarded<T> dy({4, kD}, dy_values), dtable({2, kD}, T{0});
  ANNULUS_CHECK_OK(EmbeddingBackward(ctx, ids.ref(), dy.ref(), dtable.ref()));
  std::vector<T> gradient(dy_values.begin() + 3 * kD, dy_values.end());
  gradient.insert(gradient.end(), dy_values.begin() + kD, dy_values.begin() + 2 * kD);
  EXPECT_EQ(dtable.values(), gradient);
}

TYPED_TEST(EmbeddingTest, BackwardAddsInTheOrderOfTokens) {
  using T = TypeParam;
  Context ctx{Device{}};
  const int64_t d = 19;
  const std::vector<int32_t> tokens = {1, 3, 1, 1, 0};
  Guarded<int32_t> ids({5}, tokens);
  const auto before = NormalValues<T>(4 * d, "dtable"), dy_values = NormalValues<T>(5 * d, "dy");
  Guarded<T> dtable({4, d}, before), dy({5, d}, dy_values);
  ANNULUS_CHECK_OK(EmbeddingBackward(ctx, ids.ref(), dy.ref(), dtable.ref()));
  auto expected = before;
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 0; i < d; ++i) {
      expected[reference::At(tokens[static_cast<size_t>(t)], i, d)] += dy_values[reference::At(t, i, d)];
    }
  }
  EXPECT_EQ(dtable.values(), expected);
}

TEST(EmbeddingGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  Guarded<int32_t> tokens({3}, {2, 0, 2});
  Guarded<double> table({3, 4}, NormalValues<double>(12, "table")), dtable({3, 4}, 0.0);
  Guarded<double> y({3, 4}), dy({3, 4}, NormalValues<double>(12, "dy"));
  ANNULUS_CHECK_OK(EmbeddingBackward(ctx, tokens.ref(), dy.ref(), dtable.ref()));
  ExpectGradient(
      [&] {
        ANNULUS_CHECK_OK(EmbeddingForward(ctx, tokens.ref(), table.ref(), y.ref()));
        return Dot(y.values(), dy.values());
      },
      table.data(), dtable.values());
}

TEST(EmbeddingArguments, AreRefusedByName) {
  Context ctx{Device{}};
  Guarded<float> table({5, 2}, 0.0f), y({2, 2}, 0.0f);
  constexpr auto kRange = absl::StatusCode::kOutOfRange;
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<int32_t> high({2}, {4, 5}), behind({2}, {-1, 7}), none({0}, std::vector<int32_t>{});
  Guarded<int64_t> wide({2}, {4, 4});
  Guarded<double> doubles({5, 2}, 0.0);
  ExpectRefused(EmbeddingForward(ctx, high.ref(), table.ref(), y.ref()), kRange, "embedding.tokens[1]=5");
  ExpectRefused(EmbeddingForward(ctx, behind.ref(), table.ref(), y.ref()), kRange, "embedding.tokens[1]=7");
  ExpectRefused(EmbeddingBackward(ctx, high.ref(), y.ref(), table.ref()), kRange, "embedding.tokens[1]=5");
  EXPECT_TRUE(EmbeddingForward(ctx, none.ref(), table.ref(), y.ref().Rows(0, 0)).ok());
  ExpectRefused(EmbeddingForward(ctx, none.ref(), table.ref(), y.ref()), kInvalid, "embedding.y=f32[2, 2]");
  ExpectRefused(EmbeddingForward(ctx, wide.ref(), table.ref(), y.ref()), kInvalid, "embedding.tokens=i64[2]");
  ExpectRefused(EmbeddingForward(ctx, high.ref(), doubles.ref(), y.ref()), kInvalid,
                "embedding.table=f64[5, 2] on cpu: expected f32[5, 2] on cpu");
  ExpectRefused(EmbeddingBackward(ctx, high.ref(), y.ref(), doubles.ref()), kInvalid,
                "embedding.dtable=f64[5, 2] on cpu: expected f32[5, 2] on cpu");
}

}  // namespace
}  // namespace annulus::testing
