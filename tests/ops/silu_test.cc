#include "annulus/ops/silu.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class SiluTest : public ::testing::Test {};
TYPED_TEST_SUITE(SiluTest, FloatTypes);

// On columns of a wider matrix, whose other columns stay as they are.
TYPED_TEST(SiluTest, MatchesLoopsOnColumns) {
  using T = TypeParam;
  Context ctx{Device{}};
  constexpr int64_t kWide = 40;
  for (const int64_t tokens : {0, 1, 5}) {
    for (const int64_t columns : {0, 1, 17, 33}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", columns));
      Guarded<T> x({tokens, kWide}, NormalValues<T>(tokens * kWide, "x", 4)), y({tokens, kWide}, T{7});
      const auto cols = [&](Guarded<T>& t) { return MatrixRef(t.ref()).Cols(3, 3 + columns); };
      ANNULUS_CHECK_OK(SiluForward(ctx, cols(x), cols(y)));
      ExpectMatches<T>(y.values(), [&]<class W>() {
        std::vector<W> out(static_cast<size_t>(tokens * kWide), W{7});
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t c = 3; c < 3 + columns; ++c) {
            const size_t i = static_cast<size_t>(t * kWide + c);
            const W value = static_cast<W>(x.values()[i]);
            out[i] = value / (1 + std::exp(-value));
          }
        }
        return out;
      });
    }
  }
}

TEST(SiluGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  Guarded<double> x({3, 5}, NormalValues<double>(15, "x", 2)), dy({3, 5}, NormalValues<double>(15, "dy"));
  Guarded<double> y({3, 5}), dx({3, 5});
  ANNULUS_CHECK_OK(SiluBackward(ctx, x.ref(), dy.ref(), dx.ref()));
  ExpectGradient(
      [&] {
        ANNULUS_CHECK_OK(SiluForward(ctx, x.ref(), y.ref()));
        return Dot(y.values(), dy.values());
      },
      x.data(), dx.values());
}

TEST(SigmoidGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  Guarded<double> x({3, 5}, NormalValues<double>(15, "x", 2)), dy({3, 5}, NormalValues<double>(15, "dy"));
  Guarded<double> y({3, 5}), dx({3, 5});
  ANNULUS_CHECK_OK(SigmoidForward(ctx, x.ref(), y.ref()));
  for (size_t i = 0; i < 15; ++i) EXPECT_NEAR(y.values()[i], 1 / (1 + std::exp(-x.values()[i])), 1e-15);
  ANNULUS_CHECK_OK(SigmoidBackward(ctx, y.ref(), dy.ref(), dx.ref()));
  ExpectGradient(
      [&] {
        ANNULUS_CHECK_OK(SigmoidForward(ctx, x.ref(), y.ref()));
        return Dot(y.values(), dy.values());
      },
      x.data(), dx.values());
}

TEST(SiluArguments, AreRefusedByName) {
  Context ctx{Device{}};
  Guarded<float> x({2, 4}, 1.0f), y({2, 3}, 1.0f);
  ExpectRefused(SiluForward(ctx, x.ref(), y.ref()), absl::StatusCode::kInvalidArgument, "silu.y=f32 [2, 3]");
}

}  // namespace
}  // namespace annulus::testing
