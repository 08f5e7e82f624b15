#include "annulus/ops/relu_squared.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

template <typename T>
class ReluSquaredTest : public ::testing::Test {};
TYPED_TEST_SUITE(ReluSquaredTest, FloatTypes);

TYPED_TEST(ReluSquaredTest, MatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t tokens : {0, 1, 6}) {
    for (const int64_t d : {0, 1, 15, 16, 17, 333}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", d));
      Guarded<T> x({tokens, d}, NormalValues<T>(tokens * d, "x", 4)), h({tokens, d});
      Guarded<T> dh({tokens, d}, NormalValues<T>(tokens * d, "dh")), dx({tokens, d});
      ANNULUS_CHECK_OK(ReluSquaredForward(ctx, x.ref(), h.ref()));
      ANNULUS_CHECK_OK(ReluSquaredBackward(ctx, x.ref(), dh.ref(), dx.ref()));
      const auto want = [&]<class W>(auto&& of) {
        const auto in = Cast<W>(x.values()), upstream = Cast<W>(dh.values());
        std::vector<W> out(in.size());
        for (size_t i = 0; i < in.size(); ++i) out[i] = in[i] > 0 ? of(in[i], upstream[i]) : W{0};
        return out;
      };
      ExpectMatches<T>(h.values(),
                       [&]<class W>() { return want.template operator()<W>([](W v, W) { return v * v; }); });
      ExpectMatches<T>(dx.values(), [&]<class W>() {
        return want.template operator()<W>([](W v, W upstream) { return 2 * v * upstream; });
      });
    }
  }
}

TYPED_TEST(ReluSquaredTest, WorksInPlace) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> x({1, 3}, {T{-2}, T{0}, T{3}}), dh({1, 3}, T{5});
  ANNULUS_CHECK_OK(ReluSquaredBackward(ctx, x.ref(), dh.ref(), dh.ref()));
  ANNULUS_CHECK_OK(ReluSquaredForward(ctx, x.ref(), x.ref()));
  EXPECT_EQ(x.values(), (std::vector<T>{T{0}, T{0}, T{9}}));
  EXPECT_EQ(dh.values(), (std::vector<T>{T{0}, T{0}, T{30}}));
}

// NaN must reach the loss, where training stops on it.
TYPED_TEST(ReluSquaredTest, NotANumberStays) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> x({1, 2}, {std::numeric_limits<T>::quiet_NaN(), -std::numeric_limits<T>::infinity()}), h({1, 2});
  ANNULUS_CHECK_OK(ReluSquaredForward(ctx, x.ref(), h.ref()));
  EXPECT_TRUE(std::isnan(h.values()[0]));
  EXPECT_EQ(h.values()[1], 0);
}

TEST(ReluSquaredGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  constexpr int64_t kTokens = 2, kD = 5;
  Guarded<double> x({kTokens, kD}, NormalValues<double>(kTokens * kD, "x"));
  Guarded<double> h({kTokens, kD}), dh({kTokens, kD}, NormalValues<double>(kTokens * kD, "dh"));
  Guarded<double> dx({kTokens, kD});
  ANNULUS_CHECK_OK(ReluSquaredBackward(ctx, x.ref(), dh.ref(), dx.ref()));
  const auto objective = [&] {
    ANNULUS_CHECK_OK(ReluSquaredForward(ctx, x.ref(), h.ref()));
    return Dot(h.values(), dh.values());
  };
  ExpectGradient(objective, x.data(), dx.values());
}

TEST(ReluSquaredArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> x({2, 4}, 1.0f), flat({8}, 1.0f), narrow({2, 3}, 1.0f);
  ExpectRefused(ReluSquaredForward(ctx, flat.ref(), x.ref()), kInvalid, "relu_squared.x=[8]");
  ExpectRefused(ReluSquaredForward(ctx, x.ref(), narrow.ref()), kInvalid, "relu_squared.h=f32[2, 3]");
  ExpectRefused(ReluSquaredBackward(ctx, x.ref(), narrow.ref(), x.ref()), kInvalid,
                "relu_squared.dh=f32[2, 3]");
  ExpectRefused(ReluSquaredBackward(ctx, x.ref(), x.ref(), narrow.ref()), kInvalid,
                "relu_squared.dx=f32[2, 3]");
}

}  // namespace
}  // namespace annulus::testing
