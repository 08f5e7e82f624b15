#include "annulus/ops/taylor_features.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

template <typename T>
using HeadDims = typename StridedHeads<T>::Dims;

template <typename T>
std::vector<T> Poison(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n), std::numeric_limits<T>::quiet_NaN());
}

template <typename W>
std::vector<W> FeaturesByLoops(const std::vector<W>& x, int64_t d) {
  std::vector<W> y;
  for (size_t head = 0; head < x.size(); head += static_cast<size_t>(d)) {
    const W root = std::sqrt(static_cast<W>(d));
    y.push_back(1);
    for (int64_t i = 0; i < d; ++i) y.push_back(x[head + static_cast<size_t>(i)] / std::sqrt(root));
    for (int64_t i = 0; i < d * d; ++i) {
      const W product = x[head + static_cast<size_t>(i / d)] * x[head + static_cast<size_t>(i % d)];
      y.push_back(product / (std::sqrt(W{2}) * root));
    }
  }
  return y;
}

template <typename T>
class TaylorFeaturesTest : public ::testing::Test {};
TYPED_TEST_SUITE(TaylorFeaturesTest, FloatTypes);

TYPED_TEST(TaylorFeaturesTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
    for (const HeadDims<T> dims :
         {HeadDims<T>{0, 2, 2, 4}, HeadDims<T>{3, 2, 2, 1}, HeadDims<T>{70, 1, 3, 16}}) {
      SCOPED_TRACE(dims.dim);
      StridedHeads<T> x(dims, order, NormalValues<T>(dims.elements(), "x"));
      HeadDims<T> wide = dims;
      wide.dim = TaylorFeatures(dims.dim);
      StridedHeads<T> y(wide, order, Poison<T>(wide.elements()));
      ANNULUS_CHECK_OK(TaylorFeaturesForward(ctx, x.ref(), y.ref()));
      ExpectMatches<T>(y.values(),
                       [&]<class W>() { return FeaturesByLoops<W>(Cast<W>(x.values()), dims.dim); });
    }
  }
}

// phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q.k / sqrt(d): what the features are for.
TEST(TaylorFeatures, ProductsAreTheExpansionOfTheExponential) {
  Context ctx{Device{}};
  const HeadDims<double> dims{5, 1, 2, 6}, wide{5, 1, 2, TaylorFeatures(6)};
  const auto order = BatchOrder::kInsideRows;
  StridedHeads<double> q(dims, order, NormalValues<double>(dims.elements(), "q"));
  StridedHeads<double> k(dims, order, NormalValues<double>(dims.elements(), "k"));
  StridedHeads<double> fq(wide, order, Poison<double>(wide.elements()));
  StridedHeads<double> fk(wide, order, Poison<double>(wide.elements()));
  ANNULUS_CHECK_OK(TaylorFeaturesForward(ctx, q.ref(), fq.ref()));
  ANNULUS_CHECK_OK(TaylorFeaturesForward(ctx, k.ref(), fk.ref()));
  const auto head = [](const std::vector<double>& all, int64_t i, int64_t dim) {
    return std::vector<double>(all.begin() + i * dim, all.begin() + (i + 1) * dim);
  };
  for (int64_t i = 0; i < 10; ++i) {
    const double s = Dot(head(q.values(), i, 6), head(k.values(), i, 6)) / std::sqrt(6.0);
    const double product = Dot(head(fq.values(), i, wide.dim), head(fk.values(), i, wide.dim));
    EXPECT_NEAR(product, 1 + s + s * s / 2, 1e-14 * (1 + s * s));
  }
}

TEST(TaylorFeaturesGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  const HeadDims<double> dims{3, 2, 2, 4}, wide{3, 2, 2, TaylorFeatures(4)};
  const auto order = BatchOrder::kOutsideRows;
  auto values = NormalValues<double>(dims.elements(), "x");
  const auto dys = NormalValues<double>(wide.elements(), "dy");
  StridedHeads<double> x(dims, order, values), dx(dims, order, Poison<double>(dims.elements()));
  StridedHeads<double> y(wide, order, Poison<double>(wide.elements())), dy(wide, order, dys);
  ANNULUS_CHECK_OK(TaylorFeaturesBackward(ctx, x.ref(), dy.ref(), dx.ref()));
  const auto objective = [&] {
    x.Set(values);
    ANNULUS_CHECK_OK(TaylorFeaturesForward(ctx, x.ref(), y.ref()));
    return Dot(y.values(), dys);
  };
  ExpectGradient(objective, values.data(), dx.values());
}

TYPED_TEST(TaylorFeaturesTest, NormaliseMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  const HeadDims<T> dims{6, 2, 3, 5}, wide{6, 2, 3, 6};
  const auto order = BatchOrder::kInsideRows;
  std::vector<T> nums = NormalValues<T>(wide.elements(), "num");
  for (size_t i = 5; i < nums.size(); i += 6) nums[i] = 2 + std::abs(nums[i]);
  StridedHeads<T> num(wide, order, nums), o(dims, order, Poison<T>(dims.elements()));
  ANNULUS_CHECK_OK(NormaliseForward(ctx, num.ref(), 0.5, o.ref()));
  ExpectMatches<T>(o.values(), [&]<class W>() {
    std::vector<W> expected;
    for (size_t i = 0; i < nums.size(); ++i) {
      if (i % 6 != 5)
        expected.push_back(static_cast<W>(nums[i]) / (static_cast<W>(nums[i / 6 * 6 + 5]) + W(0.5)));
    }
    return expected;
  });
}

TEST(NormaliseGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  const HeadDims<double> dims{3, 2, 2, 4}, wide{3, 2, 2, 5};
  const auto order = BatchOrder::kInsideRows;
  std::vector<double> nums = NormalValues<double>(wide.elements(), "num");
  for (size_t i = 4; i < nums.size(); i += 5) nums[i] = 2 + std::abs(nums[i]);
  const auto dos = NormalValues<double>(dims.elements(), "do");
  StridedHeads<double> num(wide, order, nums), dnum(wide, order, Poison<double>(wide.elements()));
  StridedHeads<double> o(dims, order, Poison<double>(dims.elements())), do_(dims, order, dos);
  ANNULUS_CHECK_OK(NormaliseBackward(ctx, num.ref(), 1e-6, do_.ref(), dnum.ref()));
  const auto objective = [&] {
    num.Set(nums);
    ANNULUS_CHECK_OK(NormaliseForward(ctx, num.ref(), 1e-6, o.ref()));
    return Dot(o.values(), dos);
  };
  ExpectGradient(objective, nums.data(), dnum.values());
}

TEST(AppendOnes, HasDropLastColumnAsItsInverseAndAdjoint) {
  Context ctx{Device{}};
  const HeadDims<float> dims{3, 2, 2, 3}, wide{3, 2, 2, 4};
  StridedHeads<float> x(dims, BatchOrder::kOutsideRows, NormalValues<float>(dims.elements(), "x"));
  StridedHeads<float> back(dims, BatchOrder::kInsideRows, Poison<float>(dims.elements()));
  StridedHeads<float> y(wide, BatchOrder::kInsideRows, Poison<float>(wide.elements()));
  ANNULUS_CHECK_OK(AppendOnes(ctx, x.ref(), y.ref()));
  const std::vector<float> values = y.values(), in = x.values();
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(values[i], i % 4 == 3 ? 1 : in[i / 4 * 3 + i % 4]) << i;
  }
  ANNULUS_CHECK_OK(DropLastColumn(ctx, y.ref(), back.ref()));
  EXPECT_TRUE(SameBits(back.values(), in));
}

TEST(TaylorFeaturesArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const HeadDims<float> dims{2, 1, 2, 3};
  StridedHeads<float> x(dims, BatchOrder::kInsideRows, NormalValues<float>(dims.elements(), "x"));
  ExpectRefused(TaylorFeaturesForward(ctx, x.ref(), x.ref()), kInvalid,
                "taylor_features.y=f32[2, 1, 2, 3]: expected f32[2, 1, 2, 13]");
  ExpectRefused(TaylorFeaturesBackward(ctx, x.ref(), x.ref(), x.ref()), kInvalid, "taylor_features.dy=");
  ExpectRefused(NormaliseForward(ctx, x.ref(), 1e-6, x.ref()), kInvalid,
                "normalise.num=f32[2, 1, 2, 3]: expected f32[2, 1, 2, 4]");
  ExpectRefused(NormaliseForward(ctx, x.ref(), -1, x.ref()), kInvalid, "normalise.eps=-1");
  ExpectRefused(AppendOnes(ctx, x.ref(), x.ref()), kInvalid, "append_ones.y=");
  ExpectRefused(DropLastColumn(ctx, x.ref(), x.ref()), kInvalid, "drop_last_column.y=");
}

}  // namespace
}  // namespace annulus::testing
