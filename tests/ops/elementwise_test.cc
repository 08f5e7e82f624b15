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
    Guarded<double> sum({1}, 0.0), again({1}, 0.0);
    ANNULUS_CHECK_OK(AddSumOfSquares(ctx, x.ref(), sum.ref()));
    ANNULUS_CHECK_OK(AddSumOfSquares(ctx, x.ref(), again.ref()));
    const double once = sum.values()[0];
    EXPECT_NEAR(once, static_cast<double>(expected), 1e-15 * n * static_cast<double>(expected));
    EXPECT_EQ(once, again.values()[0]);
    ANNULUS_CHECK_OK(AddSumOfSquares(ctx, x.ref(), sum.ref()));
    EXPECT_EQ(sum.values()[0], 2 * once);
  }
}

TEST(Elementwise, ClipFactorBoundsTheNormAndTellsNonFinite) {
  Context ctx{Device{}};
  constexpr double kInfinity = std::numeric_limits<double>::infinity(),
                   kNan = std::numeric_limits<double>::quiet_NaN();
  const auto factor = [&](const std::vector<double>& stats, double max_norm) {
    Guarded<double> in({static_cast<int64_t>(stats.size())}, stats), out({1}, 77.0);
    ANNULUS_CHECK_OK(ClipFactor(ctx, in.ref(), max_norm, out.ref()));
    return out.values()[0];
  };
  EXPECT_EQ(factor({16}, 2), 0.5);
  EXPECT_EQ(factor({16, 1e300}, 2), 0.5);
  EXPECT_EQ(factor({16}, 4), 1);
  EXPECT_EQ(factor({0}, 4), 1);
  EXPECT_EQ(factor({1e300}, 0), 1);
  for (const double max_norm : {0.0, 1.0}) {
    EXPECT_TRUE(std::isnan(factor({kNan}, max_norm)));
    EXPECT_TRUE(std::isnan(factor({kInfinity}, max_norm)));
    EXPECT_TRUE(std::isnan(factor({1, 2, -kInfinity}, max_norm)));
  }
  Guarded<double> one({1}, 1.0), none({0}, std::vector<double>{});
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(ClipFactor(ctx, none.ref(), 1, one.ref()), kInvalid, "clip.stats=[0]");
  ExpectRefused(ClipFactor(ctx, one.ref(), -1, one.ref()), kInvalid, "clip.max_norm=-1");
  ExpectRefused(ClipFactor(ctx, one.ref(), kNan, one.ref()), kInvalid, "clip.max_norm=nan");
}

template <typename From, typename To>
std::vector<To> CastOp(const std::vector<From>& x) {
  Context ctx{Device{}};
  std::vector<From> from = x;
  std::vector<To> to(x.size());
  const Shape shape{static_cast<int64_t>(x.size())};
  ANNULUS_CHECK_OK(annulus::Cast(ctx, TensorRef(from.data(), DTypeOf<From>(), Device{}, shape),
                                 TensorRef(to.data(), DTypeOf<To>(), Device{}, shape)));
  return to;
}

TEST(Elementwise, CastRoundsOnceToNearestEven) {
  const auto bf16 = [](std::initializer_list<uint16_t> bits) {
    std::vector<BFloat16> values;
    for (const uint16_t b : bits) values.push_back({b});
    return values;
  };
  constexpr double kHuge = 1e39, kInfinity = std::numeric_limits<double>::infinity();
  const double half = 1.0 / 256,
               above = half + 0x1p-40;  // half a unit in the last place of 1; f32 cannot tell
  EXPECT_EQ((CastOp<double, BFloat16>(
                {1, 1 + half, 1 + above, 1 + 3 * half, -1 - half, -1 - above, kHuge, -kInfinity})),
            bf16({0x3f80, 0x3f80, 0x3f81, 0x3f82, 0xbf80, 0xbf81, 0x7f80, 0xff80}));
  EXPECT_EQ((CastOp<double, BFloat16>({1 + 3 * half - 0x1p-40, 0x1p-133, 0x1p-134, 0x1.8p-134, 0})),
            bf16({0x3f81, 0x0001, 0x0000, 0x0001, 0}));
  EXPECT_EQ((CastOp<float, BFloat16>({1, 1 + 0x1p-8f, 1 + 0x1.2p-8f, -3})),
            bf16({0x3f80, 0x3f80, 0x3f81, 0xc040}));
  EXPECT_EQ((CastOp<BFloat16, float>(bf16({0x3f81, 0xc040}))), (std::vector<float>{1.0078125f, -3}));
  EXPECT_EQ((CastOp<BFloat16, double>(bf16({0x3f81, 0xff80}))), (std::vector<double>{1.0078125, -kInfinity}));
  EXPECT_EQ((CastOp<BFloat16, BFloat16>(bf16({0x3f81, 0xff80}))), bf16({0x3f81, 0xff80}));
  EXPECT_EQ((CastOp<double, float>({1 + 0x1p-24, kHuge})), (std::vector<float>{1, HUGE_VALF}));
  EXPECT_EQ((CastOp<float, double>({0.1f})), (std::vector<double>{static_cast<double>(0.1f)}));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(std::isnan(ToFloat(CastOp<double, BFloat16>({nan})[0])));
  EXPECT_TRUE((CastOp<float, BFloat16>({})).empty());
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
  ExpectRefused(AddSumOfSquares(ctx, wide.ref(), wide.ref()), kInvalid, "sum_of_squares.sum=f64[3]");
  ExpectRefused(annulus::Cast(ctx, x, wide.ref()), kInvalid, "cast.x=i32[3]: expected f32 or f64");
  ExpectRefused(annulus::Cast(ctx, wide.ref(), narrow.ref().Rows(0, 2)), kInvalid, "cast.y=f32[2]");
}

}  // namespace
}  // namespace annulus::testing
