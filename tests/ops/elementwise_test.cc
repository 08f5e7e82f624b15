#include "annulus/ops/elementwise.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

constexpr int64_t kSizes[] = {0, 1, 15, 16, 17, 1000};

template <typename T>
class ElementwiseTest : public ::testing::Test {};
TYPED_TEST_SUITE(ElementwiseTest, FloatTypes);

TYPED_TEST(ElementwiseTest, ZeroCopyAddScale) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t n : kSizes) {
    SCOPED_TRACE(n);
    const auto a = NormalValues<T>(n, "a"), b = NormalValues<T>(n, "b");
    Guarded<T> x({n}, a), y({n});
    ANNULUS_CHECK_OK(Zero(ctx, y.ref()));
    EXPECT_EQ(y.values(), std::vector<T>(static_cast<size_t>(n)));
    y.Set(b);
    ANNULUS_CHECK_OK(AddInPlace(ctx, x.ref(), y.ref()));
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(y.values()[i], b[i] + a[i]);
    ANNULUS_CHECK_OK(Copy(ctx, x.ref(), y.ref()));
    EXPECT_EQ(y.values(), a);
    ANNULUS_CHECK_OK(Scale(ctx, 0.3, y.ref()));
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(y.values()[i], a[i] * static_cast<T>(0.3));
    EXPECT_EQ(x.values(), a);
  }
}

TYPED_TEST(ElementwiseTest, SumOfSquaresIsAccumulatedInDouble) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t n : kSizes) {
    const auto a = NormalValues<T>(n, "a");
    Guarded<T> x({n}, a);
    long double expected = 0;
    for (const T v : a) expected += static_cast<long double>(v) * static_cast<long double>(v);
    const auto sum = SumOfSquares(ctx, x.ref());
    ASSERT_TRUE(sum.ok());
    EXPECT_NEAR(*sum, static_cast<double>(expected), 1e-15 * n * static_cast<double>(expected));
    EXPECT_EQ(*sum, *SumOfSquares(ctx, x.ref()));
  }
}

TEST(Elementwise, CopiesIntegersAndRefusesMismatches) {
  Context ctx{Device{}};
  std::vector<int32_t> from = {1, 2, 3}, to(3);
  const TensorRef x(from.data(), DType::kI32, Device{}, {3}), y(to.data(), DType::kI32, Device{}, {3});
  ANNULUS_CHECK_OK(Copy(ctx, x, y));
  EXPECT_EQ(to, from);
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(Copy(ctx, x, y.Rows(0, 2)), kInvalid, "copy.y=i32[2]");
  ExpectRefused(AddInPlace(ctx, x, y), kInvalid, "add.x=i32[3]: expected f32 or f64");
  Guarded<float> narrow({3}, 0.0f);
  Guarded<double> wide({3}, 0.0);
  ExpectRefused(AddInPlace(ctx, wide.ref(), narrow.ref()), kInvalid, "add.y=f32[3]");
}

}  // namespace
}  // namespace annulus::testing
