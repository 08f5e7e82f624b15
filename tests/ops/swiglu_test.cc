#include "annulus/ops/swiglu.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

template <typename T>
class SwigluTest : public ::testing::Test {};
TYPED_TEST_SUITE(SwigluTest, FloatTypes);

TYPED_TEST(SwigluTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t tokens : {0, 1, 6}) {
    for (const int64_t d : {0, 1, 15, 16, 17, 333}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", d));
      Guarded<T> gate_up({tokens, 2 * d}, NormalValues<T>(tokens * 2 * d, "gate_up", 4)), h({tokens, d});
      ANNULUS_CHECK_OK(SwigluForward(ctx, gate_up.ref(), h.ref()));
      ExpectMatches<T>(h.values(),
                       [&]<class W>() { return reference::Swiglu<W>(Cast<W>(gate_up.values()), tokens, d); });
    }
  }
}

TYPED_TEST(SwigluTest, BackwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  const int64_t tokens = 5, d = 37;
  Guarded<T> gate_up({tokens, 2 * d}, NormalValues<T>(tokens * 2 * d, "gate_up", 4));
  Guarded<T> dh({tokens, d}, NormalValues<T>(tokens * d, "dh")), dgate_up({tokens, 2 * d});
  ANNULUS_CHECK_OK(SwigluBackward(ctx, gate_up.ref(), dh.ref(), dgate_up.ref()));
  ExpectMatches<T>(dgate_up.values(), [&]<class W>() {
    const auto in = Cast<W>(gate_up.values()), upstream = Cast<W>(dh.values());
    std::vector<W> gradient(in.size());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < d; ++i) {
        const W gate = in[reference::At(t, i, 2 * d)], up = in[reference::At(t, d + i, 2 * d)];
        const W e = std::exp(-gate), dout = upstream[reference::At(t, i, d)];
        gradient[reference::At(t, i, 2 * d)] = dout * up * (1 + e + gate * e) / ((1 + e) * (1 + e));
        gradient[reference::At(t, d + i, 2 * d)] = dout * gate / (1 + e);
      }
    }
    return gradient;
  });
}

// Saturated gates give zero or `up`; NaN must reach the loss, where training stops on it.
TYPED_TEST(SwigluTest, ExtremeGates) {
  using T = TypeParam;
  Context ctx{Device{}};
  const T nan = std::numeric_limits<T>::quiet_NaN(), large = std::numeric_limits<T>::max() / 4;
  Guarded<T> gate_up({1, 8}, {large, -large, nan, T{-1000}, T{2}, T{2}, T{2}, T{2}}), h({1, 4});
  ANNULUS_CHECK_OK(SwigluForward(ctx, gate_up.ref(), h.ref()));
  EXPECT_EQ(h.values()[0], 2 * large);
  EXPECT_TRUE(std::isfinite(h.values()[1]));
  EXPECT_TRUE(std::isnan(h.values()[2]));
  EXPECT_NEAR(h.values()[3], 0, 1e-30);
}

TEST(SwigluGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  constexpr int64_t kTokens = 2, kD = 5;
  Guarded<double> gate_up({kTokens, 2 * kD}, NormalValues<double>(kTokens * 2 * kD, "gate_up"));
  Guarded<double> h({kTokens, kD}), dh({kTokens, kD}, NormalValues<double>(kTokens * kD, "dh"));
  Guarded<double> dgate_up({kTokens, 2 * kD});
  ANNULUS_CHECK_OK(SwigluBackward(ctx, gate_up.ref(), dh.ref(), dgate_up.ref()));
  const auto objective = [&] {
    ANNULUS_CHECK_OK(SwigluForward(ctx, gate_up.ref(), h.ref()));
    return Dot(h.values(), dh.values());
  };
  ExpectGradient(objective, gate_up.data(), dgate_up.values());
}

TEST(SwigluArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> odd({2, 5}, 1.0f), gate_up({2, 6}, 1.0f), h({2, 4}, 1.0f);
  ExpectRefused(SwigluForward(ctx, odd.ref(), h.ref()), kInvalid, "swiglu.gate_up=[2, 5]");
  ExpectRefused(SwigluForward(ctx, gate_up.ref(), h.ref()), kInvalid, "swiglu.h=f32[2, 4]");
}

}  // namespace
}  // namespace annulus::testing
