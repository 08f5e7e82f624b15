#include "annulus/ops/gated_norm.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

constexpr double kEps = 1e-5;
constexpr Gate kGates[] = {Gate::kSiluBefore, Gate::kSiluAfter, Gate::kSigmoidAfter};

struct NormDims {
  int64_t tokens = 0, columns = 0, groups = 1;
};

template <typename W>
W Activated(Gate kind, W gate) {
  const W sigmoid = 1 / (1 + std::exp(-gate));
  return kind == Gate::kSigmoidAfter ? sigmoid : gate * sigmoid;
}

template <typename W>
std::vector<W> ByLoops(Gate kind, const NormDims& d, const std::vector<W>& x, const std::vector<W>& gate,
                       const std::vector<W>& w) {
  const int64_t size = d.columns / d.groups;
  std::vector<W> y(x.size());
  for (int64_t t = 0; t < d.tokens; ++t) {
    for (int64_t g = 0; g < d.groups; ++g) {
      const auto at = [&](int64_t i) { return reference::At(t, g * size + i, d.columns); };
      const auto normed = [&](int64_t i) {
        return kind == Gate::kSiluBefore ? x[at(i)] * Activated(kind, gate[at(i)]) : x[at(i)];
      };
      W mean = 0;
      for (int64_t i = 0; i < size; ++i) mean += normed(i) * normed(i) / static_cast<W>(size);
      for (int64_t i = 0; i < size; ++i) {
        const auto weight = static_cast<size_t>((g * size + i) % static_cast<int64_t>(w.size()));
        y[at(i)] = w[weight] * normed(i) / std::sqrt(mean + static_cast<W>(kEps));
        if (kind != Gate::kSiluBefore) y[at(i)] *= Activated(kind, gate[at(i)]);
      }
    }
  }
  return y;
}

template <typename T>
class GatedNormTest : public ::testing::Test {};
TYPED_TEST_SUITE(GatedNormTest, FloatTypes);

TYPED_TEST(GatedNormTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const Gate kind : kGates) {
    for (const NormDims d : {NormDims{0, 8, 2}, NormDims{1, 1, 1}, NormDims{17, 30, 2}, NormDims{40, 51, 3},
                             NormDims{3, 0, 1}, NormDims{2, 1000, 1}}) {
      for (const int64_t weights : {d.columns, d.columns / d.groups}) {
        SCOPED_TRACE(absl::StrCat(static_cast<int>(kind), ": ", d.tokens, " ", d.columns, " ", weights));
        const int64_t n = d.tokens * d.columns;
        StridedMatrix<T> x(d.tokens, d.columns, 3, NormalValues<T>(n, "x", 3));
        StridedMatrix<T> gate(d.tokens, d.columns, 5, NormalValues<T>(n, "gate", 3));
        StridedMatrix<T> y(d.tokens, d.columns, 2, std::vector<T>(static_cast<size_t>(n), T(NAN)));
        Guarded<T> w({weights}, NormalValues<T>(weights, "w"));
        const GatedNorm norm{
            .x = x.ref(), .gate = gate.ref(), .w = w.ref(), .groups = d.groups, .eps = kEps, .kind = kind};
        ANNULUS_CHECK_OK(GatedNormForward(ctx, norm, y.ref()));
        if (d.columns == 0) continue;
        ExpectMatches<T>(y.values(), [&]<class W>() {
          return ByLoops<W>(kind, d, Cast<W>(x.values()), Cast<W>(gate.values()), Cast<W>(w.values()));
        });
      }
    }
  }
}

// All that a norm of two groups needs, for the gradient.
struct NormRun {
  NormRun(Gate kind, int64_t weights)
      : x({kTokens, kColumns}, NormalValues<double>(kElements, "x")),
        gate({kTokens, kColumns}, NormalValues<double>(kElements, "gate")),
        w({weights}, NormalValues<double>(weights, "w")),
        dy({kTokens, kColumns}, NormalValues<double>(kElements, "dy")),
        y({kTokens, kColumns}),
        dx({kTokens, kColumns}),
        dgate({kTokens, kColumns}),
        dw({weights}, 0.0),
        norm{.x = x.ref(), .gate = gate.ref(), .w = w.ref(), .groups = 2, .eps = kEps, .kind = kind} {}

  static constexpr int64_t kTokens = 5, kColumns = 8, kElements = kTokens * kColumns;
  Guarded<double> x, gate, w, dy, y, dx, dgate, dw;
  GatedNorm norm;
};

TEST(GatedNormGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  for (const Gate kind : kGates) {
    for (const int64_t weights : {8, 4}) {
      NormRun run(kind, weights);
      ANNULUS_CHECK_OK(
          GatedNormBackward(ctx, run.norm, run.dy.ref(), run.dx.ref(), run.dgate.ref(), run.dw.ref()));
      const auto objective = [&] {
        ANNULUS_CHECK_OK(GatedNormForward(ctx, run.norm, run.y.ref()));
        return Dot(run.y.values(), run.dy.values());
      };
      ExpectGradient(objective, run.x.data(), run.dx.values());
      ExpectGradient(objective, run.gate.data(), run.dgate.values());
      ExpectGradient(objective, run.w.data(), run.dw.values());
    }
  }
}

// About a dozen roundings lie between the inputs and a gradient.
TEST(GatedNormGradient, InF32AgreesWithF64) {
  Context ctx{Device{}};
  for (const Gate kind : kGates) {
    NormRun run(kind, 8);
    ANNULUS_CHECK_OK(
        GatedNormBackward(ctx, run.norm, run.dy.ref(), run.dx.ref(), run.dgate.ref(), run.dw.ref()));
    const auto narrow = [](const Guarded<double>& v) { return Cast<float>(v.values()); };
    Guarded<float> x({5, 8}, narrow(run.x)), gate({5, 8}, narrow(run.gate)), w({8}, narrow(run.w));
    Guarded<float> dy({5, 8}, narrow(run.dy)), dx({5, 8}), dgate({5, 8}), dw({8}, 0.0f);
    GatedNorm norm = run.norm;
    norm.x = x.ref();
    norm.gate = gate.ref();
    norm.w = w.ref();
    ANNULUS_CHECK_OK(GatedNormBackward(ctx, norm, dy.ref(), dx.ref(), dgate.ref(), dw.ref()));
    const auto expect_close = [](const std::vector<float>& got, const std::vector<double>& exact) {
      EXPECT_LE(MaxDifference(got, exact), 16 * std::numeric_limits<float>::epsilon() * MaxAbs(exact));
    };
    expect_close(dx.values(), run.dx.values());
    expect_close(dgate.values(), run.dgate.values());
    expect_close(dw.values(), run.dw.values());
  }
}

TEST(GatedNormBackward, AddsToTheWeightGradientOnly) {
  Context ctx{Device{}};
  NormRun once(Gate::kSiluBefore, 8), twice(Gate::kSiluBefore, 8);
  for (NormRun* run : {&once, &twice, &twice}) {
    ANNULUS_CHECK_OK(
        GatedNormBackward(ctx, run->norm, run->dy.ref(), run->dx.ref(), run->dgate.ref(), run->dw.ref()));
  }
  EXPECT_TRUE(SameBits(once.dx.values(), twice.dx.values()));
  EXPECT_TRUE(SameBits(once.dgate.values(), twice.dgate.values()));
  std::vector<double> doubled = once.dw.values();
  for (double& x : doubled) x *= 2;
  EXPECT_LE(MaxDifference(twice.dw.values(), doubled), 1e-15 * MaxAbs(doubled));
}

// One group of which each of two ranks has half the columns, with a sum over ranks made of the other's part,
// equals all of it on one rank: y, both gradients and each half of dw.
TEST(GatedNormOverRanks, EqualsOneRank) {
  Context ctx{Device{}};
  constexpr int64_t kHalf = NormRun::kColumns / 2, kTokens = NormRun::kTokens;
  for (const Gate kind : kGates) {
    NormRun whole(kind, NormRun::kColumns);
    whole.norm.groups = 1;
    ANNULUS_CHECK_OK(GatedNormForward(ctx, whole.norm, whole.y.ref()));
    ANNULUS_CHECK_OK(GatedNormBackward(ctx, whole.norm, whole.dy.ref(), whole.dx.ref(), whole.dgate.ref(),
                                       whole.dw.ref()));
    NormRun parts(kind, NormRun::kColumns);
    for (const bool backward : {false, true}) {
      // Each rank runs twice: for what it adds to the sums, then with the sums of both.
      std::vector<double> sums;
      for (const bool with_sums : {false, true}) {
        for (const int64_t rank : {0, 1}) {
          const int64_t begin = rank * kHalf, end = begin + kHalf;
          GatedNorm norm = parts.norm;
          norm.x = ConstMatrixRef(parts.x.ref()).Cols(begin, end);
          norm.gate = ConstMatrixRef(parts.gate.ref()).Cols(begin, end);
          norm.w = parts.w.ref().Rows(begin, end);
          norm.groups = 1;
          norm.group_columns = NormRun::kColumns;
          norm.sum_over_ranks = [&](TensorRef own) {
            EXPECT_EQ(own.shape(), (Shape{kTokens, backward ? 2 : 1}));
            sums.resize(static_cast<size_t>(own.elements()));
            for (size_t i = 0; i < sums.size(); ++i) {
              if (with_sums) {
                own.data<double>()[i] = sums[i];
              } else {
                sums[i] += own.data<double>()[i];
              }
            }
            return absl::OkStatus();
          };
          if (!backward) {
            ANNULUS_CHECK_OK(GatedNormForward(ctx, norm, MatrixRef(parts.y.ref()).Cols(begin, end)));
          } else {
            Guarded<double> dw({kHalf}, 0.0);
            ANNULUS_CHECK_OK(GatedNormBackward(ctx, norm, ConstMatrixRef(parts.dy.ref()).Cols(begin, end),
                                               MatrixRef(parts.dx.ref()).Cols(begin, end),
                                               MatrixRef(parts.dgate.ref()).Cols(begin, end), dw.ref()));
            std::copy_n(dw.data(), kHalf, parts.dw.data() + begin);
          }
        }
      }
    }
    const auto expect_close = [](const Guarded<double>& got, const Guarded<double>& expected) {
      EXPECT_LE(MaxDifference(got.values(), expected.values()), 1e-14 * MaxAbs(expected.values()));
    };
    expect_close(parts.y, whole.y);
    expect_close(parts.dx, whole.dx);
    expect_close(parts.dgate, whole.dgate);
    expect_close(parts.dw, whole.dw);
  }
}

TEST(GatedNormOverRanks, FailureOfTheSumIsReturned) {
  Context ctx{Device{}};
  NormRun run(Gate::kSiluBefore, 8);
  run.norm.sum_over_ranks = [](TensorRef) { return absl::UnavailableError("peer"); };
  EXPECT_EQ(GatedNormForward(ctx, run.norm, run.y.ref()).code(), absl::StatusCode::kUnavailable);
}

TEST(GatedNormArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  NormRun run(Gate::kSiluBefore, 8);
  const auto refuses = [&](const GatedNorm& norm, absl::string_view text) {
    ExpectRefused(GatedNormForward(ctx, norm, run.y.ref()), kInvalid, text);
  };
  GatedNorm norm = run.norm;
  norm.groups = 3;
  refuses(norm, "gated_norm.groups=3: expected a divisor of 8 columns");
  norm = run.norm;
  norm.eps = -1;
  refuses(norm, "gated_norm.eps=-1");
  norm = run.norm;
  norm.group_columns = 8;
  refuses(norm, "gated_norm.group_columns=8: expected the 4 columns of a group here");
  norm = run.norm;
  norm.w = run.x.ref();
  refuses(norm, "gated_norm.w=f64[5, 8] on cpu: expected f64[8] on cpu");
  ExpectRefused(GatedNormForward(ctx, run.norm, run.w.ref()), kInvalid, "gated_norm.y=f64[1, 8]");
}

}  // namespace
}  // namespace annulus::testing
