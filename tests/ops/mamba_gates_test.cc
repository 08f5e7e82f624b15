#include "annulus/ops/mamba_gates.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

struct GateDims {
  int64_t tokens = 0, heads = 1;
  double low = 0, high = 0;
};

template <typename W>
struct Gates {
  std::vector<W> dt, a;
};

template <typename W>
Gates<W> ByLoops(const GateDims& d, const std::vector<W>& raw, const std::vector<W>& bias,
                 const std::vector<W>& a_log) {
  Gates<W> out;
  for (int64_t i = 0; i < d.tokens * d.heads; ++i) {
    const auto h = static_cast<size_t>(i % d.heads);
    const W u = raw[static_cast<size_t>(i)] + bias[h];
    W dt = u > 0 ? u + std::log1p(std::exp(-u)) : std::log1p(std::exp(u));
    dt = std::max(dt, static_cast<W>(d.low));
    if (d.high > 0) dt = std::min(dt, static_cast<W>(d.high));
    out.dt.push_back(dt);
    out.a.push_back(-std::exp(a_log[h]) * dt);
  }
  return out;
}

template <typename T>
class MambaGatesTest : public ::testing::Test {};
TYPED_TEST_SUITE(MambaGatesTest, FloatTypes);

TYPED_TEST(MambaGatesTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const GateDims d : {GateDims{0, 4}, GateDims{5, 1}, GateDims{9, 17}, GateDims{9, 17, 0.4, 1.5}}) {
    SCOPED_TRACE(absl::StrCat(d.tokens, " ", d.heads));
    StridedMatrix<T> raw(d.tokens, d.heads, 3, NormalValues<T>(d.tokens * d.heads, "raw", 6));
    Guarded<T> bias({d.heads}, NormalValues<T>(d.heads, "bias"));
    Guarded<T> a_log({d.heads}, NormalValues<T>(d.heads, "a_log"));
    Guarded<T> dt({d.tokens, d.heads}), a({d.tokens, d.heads});
    const MambaGates gates{
        .raw = raw.ref(), .bias = bias.ref(), .a_log = a_log.ref(), .low = d.low, .high = d.high};
    ANNULUS_CHECK_OK(MambaGatesForward(ctx, gates, dt.ref(), a.ref()));
    const auto loops = [&]<class W>() {
      return ByLoops<W>(d, Cast<W>(raw.values()), Cast<W>(bias.values()), Cast<W>(a_log.values()));
    };
    const auto naive = loops.template operator()<T>();
    const auto wide = loops.template operator()<Wide<T>>();
    ExpectMatches<T>(dt.values(), naive.dt, wide.dt);
    ExpectMatches<T>(a.values(), naive.a, wide.a);
  }
}

// Neither overflows nor loses small steps: softplus(-30) is nearly e^-30, and softplus(100) is 100.
TYPED_TEST(MambaGatesTest, StepsAtTheEdges) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> raw({1, 3}, {T{-30}, T{100}, T{-1000}}), bias({3}, T{0}), a_log({3}, T{0}), dt({1, 3}),
      a({1, 3});
  const MambaGates gates{.raw = raw.ref(), .bias = bias.ref(), .a_log = a_log.ref()};
  ANNULUS_CHECK_OK(MambaGatesForward(ctx, gates, dt.ref(), a.ref()));
  const auto steps = dt.values();
  EXPECT_NEAR(steps[0] / std::log1p(std::exp(-30.0)), 1, 4 * std::numeric_limits<T>::epsilon());
  EXPECT_EQ(steps[1], T{100});
  EXPECT_EQ(steps[2], T{0});
}

struct GatesRun {
  explicit GatesRun(double low, double high)
      : gates{.raw = raw.ref(), .bias = bias.ref(), .a_log = a_log.ref(), .low = low, .high = high} {}
  void Backward(Context& ctx, ConstTensorRef ddt_or_none) {
    ANNULUS_CHECK_OK(
        MambaGatesBackward(ctx, gates, ddt_or_none, da.ref(), draw.ref(), dbias.ref(), da_log.ref()));
  }

  Guarded<double> raw{{6, 3}, NormalValues<double>(18, "raw", 2)}, bias{{3}, NormalValues<double>(3, "bias")};
  Guarded<double> a_log{{3}, NormalValues<double>(3, "a_log")}, dt{{6, 3}}, a{{6, 3}}, draw{{6, 3}};
  Guarded<double> ddt{{6, 3}, NormalValues<double>(18, "ddt")}, da{{6, 3}, NormalValues<double>(18, "da")};
  Guarded<double> dbias{{3}, 0.0}, da_log{{3}, 0.0};
  MambaGates gates;
};

TEST(MambaGatesGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  for (const bool limits : {false, true}) {
    for (const bool with_ddt : {false, true}) {
      GatesRun run(limits ? 0.3 : 0, limits ? 1.5 : 0);
      run.Backward(ctx, with_ddt ? run.ddt.ref() : TensorRef{});
      const auto objective = [&] {
        ANNULUS_CHECK_OK(MambaGatesForward(ctx, run.gates, run.dt.ref(), run.a.ref()));
        return (with_ddt ? Dot(run.dt.values(), run.ddt.values()) : 0) + Dot(run.a.values(), run.da.values());
      };
      ExpectGradient(objective, run.raw.data(), run.draw.values());
      ExpectGradient(objective, run.bias.data(), run.dbias.values());
      ExpectGradient(objective, run.a_log.data(), run.da_log.values());
      const auto draw = run.draw.values();
      EXPECT_EQ(std::count(draw.begin(), draw.end(), 0.0) > 0, limits) << "limits that no step reaches";
    }
  }
}

TEST(MambaGatesGradient, ParametersAreAddedTo) {
  Context ctx{Device{}};
  GatesRun run(0, 0);
  run.Backward(ctx, run.ddt.ref());
  std::vector<double> bias_twice = run.dbias.values(), log_twice = run.da_log.values();
  for (double& x : bias_twice) x *= 2;
  for (double& x : log_twice) x *= 2;
  run.Backward(ctx, run.ddt.ref());
  EXPECT_LE(MaxDifference(run.dbias.values(), bias_twice), 1e-15 * 6 * MaxAbs(bias_twice));
  EXPECT_LE(MaxDifference(run.da_log.values(), log_twice), 1e-15 * 6 * MaxAbs(log_twice));
}

TEST(MambaGatesArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  GatesRun run(0, 0);
  const auto refuses = [&](const MambaGates& gates, absl::string_view text) {
    ExpectRefused(MambaGatesForward(ctx, gates, run.dt.ref(), run.a.ref()), kInvalid, text);
  };
  MambaGates gates = run.gates;
  gates.bias = run.raw.ref();
  refuses(gates, "mamba_gates.bias=f64[6, 3] on cpu: expected f64[3] on cpu");
  gates = run.gates;
  gates.low = -1;
  refuses(gates, "mamba_gates.low=-1: expected at least 0");
  gates.low = 2;
  gates.high = 1;
  refuses(gates, "mamba_gates.high=1: expected 0 or at least low=2");
  ExpectRefused(MambaGatesForward(ctx, run.gates, run.bias.ref(), run.a.ref()), kInvalid,
                "mamba_gates.dt=f64[3]");
  ExpectRefused(MambaGatesBackward(ctx, run.gates, run.bias.ref(), run.da.ref(), run.draw.ref(),
                                   run.dbias.ref(), run.da_log.ref()),
                kInvalid, "mamba_gates.ddt=f64[3]");
}

}  // namespace
}  // namespace annulus::testing
