#include "../../kernels/common/vector_math.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

// Largest error in units in the last place over `count` arguments spread evenly over the whole range.
template <typename T>
double WorstUlp(int64_t count) {
  using Traits = kernels::ExpTraits<T>;
  double worst = 0;
  for (int64_t i = 0; i <= count; ++i) {
    const T fraction = static_cast<T>(i) / static_cast<T>(count);
    const T x = std::min(Traits::kHighest, Traits::kLowest + (Traits::kHighest - Traits::kLowest) * fraction);
    const Wide<T> expected = std::exp(static_cast<Wide<T>>(x));
    const T rounded = static_cast<T>(expected);
    const T ulp = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
    worst = std::max(worst, static_cast<double>(std::abs(kernels::Exp(x) - expected) / ulp));
  }
  return worst;
}

template <typename T>
class VectorMathTest : public ::testing::Test {};
TYPED_TEST_SUITE(VectorMathTest, FloatTypes);

TYPED_TEST(VectorMathTest, ExpIsWithinTwoUlp) { EXPECT_LE(WorstUlp<TypeParam>(300000), 2); }

TYPED_TEST(VectorMathTest, ExpAtTheEdges) {
  using T = TypeParam;
  using Traits = kernels::ExpTraits<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  EXPECT_EQ(kernels::Exp(T{0}), T{1});
  EXPECT_EQ(kernels::Exp(-kInfinity), T{0});
  EXPECT_EQ(kernels::Exp(std::nextafter(Traits::kLowest, -kInfinity)), T{0});
  EXPECT_GE(kernels::Exp(Traits::kLowest), std::numeric_limits<T>::min());
  EXPECT_EQ(kernels::Exp(kInfinity), kernels::Exp(Traits::kHighest));
  EXPECT_TRUE(std::isfinite(kernels::Exp(kInfinity)));
  EXPECT_TRUE(std::isnan(kernels::Exp(std::numeric_limits<T>::quiet_NaN())));
}

}  // namespace
}  // namespace annulus::testing
