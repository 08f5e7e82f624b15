#include "annulus/ops/rms_norm.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

constexpr double kEps = 1e-5;

template <typename T>
class RmsNormTest : public ::testing::Test {};
TYPED_TEST_SUITE(RmsNormTest, FloatTypes);

TYPED_TEST(RmsNormTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t tokens : {0, 1, 5}) {
    for (const int64_t d : {0, 1, 15, 16, 17, 1000}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", d));
      Guarded<T> x({tokens, d}, NormalValues<T>(tokens * d, "x", 3)), w({d}, NormalValues<T>(d, "w")),
          y({tokens, d});
      ANNULUS_CHECK_OK(RmsNormForward(ctx, x.ref(), w.ref(), kEps, y.ref()));
      ExpectMatches<T>(y.values(), [&]<class W>() {
        return reference::RmsNorm<W>(Cast<W>(x.values()), Cast<W>(w.values()), kEps);
      });
    }
  }
}

TYPED_TEST(RmsNormTest, BackwardAddsToWhatIsThere) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const int64_t d : {1, 16, 37}) {
    const int64_t tokens = 9;
    const auto dx_before = NormalValues<T>(tokens * d, "dx"), dw_before = NormalValues<T>(d, "dw");
    Guarded<T> x({tokens, d}, NormalValues<T>(tokens * d, "x")), w({d}, NormalValues<T>(d, "w"));
    Guarded<T> dy({tokens, d}, NormalValues<T>(tokens * d, "dy"));
    Guarded<T> dx({tokens, d}, dx_before), dw({d}, dw_before);
    ANNULUS_CHECK_OK(RmsNormBackward(ctx, x.ref(), w.ref(), dy.ref(), kEps, dx.ref(), dw.ref()));
    // By the Jacobian: dy_j / dx_i = w_j (delta_ij r - x_i x_j r^3 / d).
    const auto gradient = [&]<class W>(bool of_weight) {
      const auto xs = Cast<W>(x.values()), ws = Cast<W>(w.values()), dys = Cast<W>(dy.values());
      auto gx = Cast<W>(dx_before), gw = Cast<W>(dw_before);
      for (int64_t t = 0; t < tokens; ++t) {
        W square = 0;
        for (int64_t i = 0; i < d; ++i) square += xs[reference::At(t, i, d)] * xs[reference::At(t, i, d)];
        const W r = 1 / std::sqrt(square / static_cast<W>(d) + static_cast<W>(kEps));
        for (int64_t j = 0; j < d; ++j) {
          const W upstream = dys[reference::At(t, j, d)], xj = xs[reference::At(t, j, d)];
          gw[static_cast<size_t>(j)] += upstream * xj * r;
          for (int64_t i = 0; i < d; ++i) {
            const W jacobian =
                (i == j ? r : 0) - xs[reference::At(t, i, d)] * xj * r * r * r / static_cast<W>(d);
            gx[reference::At(t, i, d)] += upstream * ws[static_cast<size_t>(j)] * jacobian;
          }
        }
      }
      return of_weight ? gw : gx;
    };
    ExpectMatches<T>(dx.values(), [&]<class W>() { return gradient.template operator()<W>(false); });
    ExpectMatches<T>(dw.values(), [&]<class W>() { return gradient.template operator()<W>(true); });
  }
}

TEST(RmsNormGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  constexpr int64_t kTokens = 3, kD = 7;
  Guarded<double> x({kTokens, kD}, NormalValues<double>(kTokens * kD, "x")),
      w({kD}, NormalValues<double>(kD, "w"));
  Guarded<double> y({kTokens, kD}), dy({kTokens, kD}, NormalValues<double>(kTokens * kD, "dy"));
  Guarded<double> dx({kTokens, kD}, 0.0), dw({kD}, 0.0);
  ANNULUS_CHECK_OK(RmsNormBackward(ctx, x.ref(), w.ref(), dy.ref(), kEps, dx.ref(), dw.ref()));
  const auto objective = [&] {
    ANNULUS_CHECK_OK(RmsNormForward(ctx, x.ref(), w.ref(), kEps, y.ref()));
    return Dot(y.values(), dy.values());
  };
  ExpectGradient(objective, x.data(), dx.values());
  ExpectGradient(objective, w.data(), dw.values());
}

TEST(RmsNormArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> x({2, 4}, 1.0f), w({3}, 1.0f), y({2, 4}, 1.0f);
  ExpectRefused(RmsNormForward(ctx, x.ref(), w.ref(), kEps, y.ref()), kInvalid,
                "rms_norm.w=f32[3] on cpu: expected f32[4] on cpu");
  ExpectRefused(RmsNormForward(ctx, w.ref(), w.ref(), kEps, w.ref()), kInvalid, "expected [tokens, d]");
  ExpectRefused(RmsNormForward(ctx, x.ref(), w.ref(), -1, y.ref()), kInvalid, "rms_norm.eps=-1");
  Guarded<float> w4({4}, 1.0f);
  Guarded<double> dw({4}, 0.0);
  ExpectRefused(RmsNormBackward(ctx, x.ref(), w4.ref(), y.ref(), kEps, y.ref(), dw.ref()), kInvalid,
                "rms_norm.dw=f64[4] on cpu: expected f32[4] on cpu");
  const ConstTensorRef bf16(x.data(), DType::kBF16, Device{}, {2, 4});
  ExpectRefused(RmsNormForward(ctx, bf16, w4.ref(), kEps, y.ref()), kInvalid,
                "rms_norm.x=bf16[2, 4]: expected f32 or f64");
  const ConstTensorRef elsewhere(x.data(), DType::kF32, Device{DeviceKind::kCuda, 1}, {2, 4});
  ExpectRefused(RmsNormForward(ctx, elsewhere, w4.ref(), kEps, y.ref()), kInvalid,
                "rms_norm.x is on cuda:1: expected cpu");
}

}  // namespace
}  // namespace annulus::testing
