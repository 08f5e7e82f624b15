#include "annulus/ops/adamw.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class AdamWTest : public ::testing::Test {};
TYPED_TEST_SUITE(AdamWTest, FloatTypes);

template <typename W>
struct State {
  std::vector<W> param, m, v;
};

// The paper's algorithm, one element at a time.
template <typename W>
void Step(const AdamWHyper& h, double gradient_scale, const std::vector<W>& grad, State<W>* state) {
  for (size_t i = 0; i < grad.size(); ++i) {
    const W g = static_cast<W>(gradient_scale) * grad[i];
    W &p = state->param[i], &m = state->m[i], &v = state->v[i];
    m = static_cast<W>(h.beta1) * m + static_cast<W>(1 - h.beta1) * g;
    v = static_cast<W>(h.beta2) * v + static_cast<W>(1 - h.beta2) * g * g;
    const W m_hat = m / static_cast<W>(1 - std::pow(h.beta1, h.step));
    const W v_hat = v / static_cast<W>(1 - std::pow(h.beta2, h.step));
    p -= static_cast<W>(h.lr) *
         (m_hat / (std::sqrt(v_hat) + static_cast<W>(h.eps)) + static_cast<W>(h.weight_decay) * p);
  }
}

TYPED_TEST(AdamWTest, TwentyStepsMatchThePaper) {
  using T = TypeParam;
  Context ctx{Device{}};
  AdamWHyper hyper{.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
  Guarded<double> scale({1}, 0.7);
  for (const int64_t n : {0, 1, 15, 16, 17, 100}) {
    const auto param0 = NormalValues<T>(n, "param");
    Guarded<T> param({n}, param0), m({n}, T{0}), v({n}, T{0});
    Guarded<float> copy({n});
    const auto zeros = std::vector<T>(static_cast<size_t>(n));
    State<T> naive{param0, zeros, zeros};
    State<Wide<T>> wide{Cast<Wide<T>>(param0), Cast<Wide<T>>(zeros), Cast<Wide<T>>(zeros)};
    for (hyper.step = 1; hyper.step <= 20; ++hyper.step) {
      hyper.lr = 0.01 / static_cast<double>(hyper.step);
      Guarded<T> grad({n}, NormalValues<T>(n, absl::StrCat("grad", hyper.step)));
      ANNULUS_CHECK_OK(
          AdamWUpdate(ctx, hyper, {param.ref(), m.ref(), v.ref(), grad.ref(), scale.ref(), copy.ref()}));
      Step(hyper, 0.7, grad.values(), &naive);
      Step(hyper, 0.7, Cast<Wide<T>>(grad.values()), &wide);
      EXPECT_EQ(copy.values(), Cast<float>(param.values()));
    }
    ExpectMatches<T>(param.values(), naive.param, wide.param);
    ExpectMatches<T>(m.values(), naive.m, wide.m);
    ExpectMatches<T>(v.values(), naive.v, wide.v);
  }
}

// The first bias-corrected step has the size of the learning rate, whatever the gradient's.
TEST(AdamW, FirstStepIsTheSignOfTheGradient) {
  Context ctx{Device{}};
  Guarded<double> param({2}, {1.0, 1.0}), m({2}, 0.0), v({2}, 0.0), grad({2}, {1e-3, -1e3}), one({1}, 1.0);
  ANNULUS_CHECK_OK(AdamWUpdate(ctx, {.lr = 0.25, .eps = 0},
                               {param.ref(), m.ref(), v.ref(), grad.ref(), one.ref(), TensorRef()}));
  EXPECT_NEAR(param.values()[0], 0.75, 1e-15);
  EXPECT_NEAR(param.values()[1], 1.25, 1e-15);
}

// A step whose loss or norm is not finite leaves no trace, whatever the gradient holds.
TYPED_TEST(AdamWTest, ANanScaleChangesNoBit) {
  using T = TypeParam;
  Context ctx{Device{}};
  const int64_t n = 19;
  const auto p0 = NormalValues<T>(n, "p"), m0 = NormalValues<T>(n, "m"), v0 = NormalValues<T>(n, "v");
  auto g0 = NormalValues<T>(n, "g");
  g0[3] = std::numeric_limits<T>::infinity();
  g0[4] = std::numeric_limits<T>::quiet_NaN();
  Guarded<T> param({n}, p0), m({n}, m0), v({n}, v0), grad({n}, g0), copy({n}, T{5});
  Guarded<double> scale({1}, std::numeric_limits<double>::quiet_NaN());
  ANNULUS_CHECK_OK(AdamWUpdate(ctx, {.lr = 0.5, .weight_decay = 0.1},
                               {param.ref(), m.ref(), v.ref(), grad.ref(), scale.ref(), copy.ref()}));
  EXPECT_TRUE(SameBits(param.values(), p0));
  EXPECT_TRUE(SameBits(m.values(), m0));
  EXPECT_TRUE(SameBits(v.values(), v0));
  EXPECT_EQ(copy.values(), std::vector<T>(static_cast<size_t>(n), T{5}));
}

TEST(AdamWArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> a({3}, 0.0f), b({2}, 0.0f), one({1}, 1.0f);
  Guarded<double> scale({1}, 1.0);
  const auto update = [&](const AdamWHyper& hyper, TensorRef v) {
    return AdamWUpdate(ctx, hyper, {a.ref(), a.ref(), v, a.ref(), scale.ref(), TensorRef()});
  };
  ExpectRefused(update({.step = 0}, a.ref()), kInvalid, "adamw.step=0");
  ExpectRefused(update({.beta1 = 1}, a.ref()), kInvalid, "adamw.beta1=1");
  ExpectRefused(update({.beta2 = -0.5}, a.ref()), kInvalid, "adamw.beta2=-0.5");
  ExpectRefused(update({.eps = -1}, a.ref()), kInvalid, "adamw.eps=-1");
  ExpectRefused(update({}, b.ref()), kInvalid, "adamw.v=f32[2] on cpu: expected f32[3] on cpu");
  const auto scaled = [&](ConstTensorRef s, TensorRef copy) {
    return AdamWUpdate(ctx, {}, {a.ref(), a.ref(), a.ref(), a.ref(), s, copy});
  };
  ExpectRefused(scaled(one.ref(), TensorRef()), kInvalid,
                "adamw.gradient_scale=f32[1] on cpu: expected f64[1]");
  ExpectRefused(scaled(scale.ref(), b.ref()), kInvalid, "adamw.copy=f32[2] on cpu: expected f32[3]");
  const TensorRef bf16(a.data(), DType::kBF16, Device{}, {3});
  ExpectRefused(scaled(scale.ref(), bf16), kInvalid, "adamw.copy=bf16[3]: expected f32 or f64");
}

}  // namespace
}  // namespace annulus::testing
