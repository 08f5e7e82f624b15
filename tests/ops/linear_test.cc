#include "annulus/ops/linear.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

template <typename T>
class LinearTest : public ::testing::Test {};
TYPED_TEST_SUITE(LinearTest, FloatTypes);

struct Dims {
  int64_t tokens, in, out;
};

std::vector<Dims> AllDims() {
  std::vector<Dims> all;
  for (const int64_t tokens : {0, 1, 15, 17, 33}) {
    for (const int64_t in : {0, 1, 16, 31}) {
      for (const int64_t out : {0, 1, 7, 16, 129}) all.push_back({tokens, in, out});
    }
  }
  return all;
}

// A dense row-major matrix as an accessor, and its transpose.
template <typename W>
auto Rows(const std::vector<W>& m, int64_t cols) {
  return [&m, cols](int64_t i, int64_t j) { return m[reference::At(i, j, cols)]; };
}
template <typename W>
auto Transposed(const std::vector<W>& m, int64_t cols) {
  return [&m, cols](int64_t i, int64_t j) { return m[reference::At(j, i, cols)]; };
}

// What the product adds to: nothing (and the output starts as NaN), or what the output held.
template <typename T>
std::vector<T> Initial(Write write, int64_t n) {
  if (write == Write::kAccumulate) return NormalValues<T>(n, "initial");
  return std::vector<T>(static_cast<size_t>(n), std::numeric_limits<T>::quiet_NaN());
}
template <typename W, typename T>
std::vector<W> Base(Write write, const std::vector<T>& initial) {
  return write == Write::kAccumulate ? Cast<W>(initial) : std::vector<W>(initial.size());
}

TYPED_TEST(LinearTest, ForwardMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const auto& [tokens, in, out] : AllDims()) {
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", in, " ", out));
      const auto x = NormalValues<T>(tokens * in, "x"), w = NormalValues<T>(out * in, "w");
      const auto initial = Initial<T>(write, tokens * out);
      StridedMatrix<T> x_view(tokens, in, 3, x), w_view(out, in, 0, w), y_view(tokens, out, 5, initial);
      ANNULUS_CHECK_OK(LinearForward(ctx, x_view.ref(), w_view.ref(), write, y_view.ref()));
      ExpectMatches<T>(y_view.values(), [&]<class W>() {
        const auto xs = Cast<W>(x), ws = Cast<W>(w);
        return reference::Gemm<W>({tokens, out, in}, Rows(xs, in), Transposed(ws, in),
                                  Base<W>(write, initial));
      });
    }
  }
}

TYPED_TEST(LinearTest, BackwardInputMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const auto& [tokens, in, out] : AllDims()) {
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", in, " ", out));
      const auto dy = NormalValues<T>(tokens * out, "dy"), w = NormalValues<T>(out * in, "w");
      const auto initial = Initial<T>(write, tokens * in);
      StridedMatrix<T> dy_view(tokens, out, 2, dy), w_view(out, in, 1, w), dx_view(tokens, in, 4, initial);
      ANNULUS_CHECK_OK(LinearBackwardInput(ctx, dy_view.ref(), w_view.ref(), write, dx_view.ref()));
      ExpectMatches<T>(dx_view.values(), [&]<class W>() {
        const auto dys = Cast<W>(dy), ws = Cast<W>(w);
        return reference::Gemm<W>({tokens, in, out}, Rows(dys, out), Rows(ws, in), Base<W>(write, initial));
      });
    }
  }
}

TYPED_TEST(LinearTest, BackwardWeightAddsToWhatIsThere) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const auto& [tokens, in, out] : AllDims()) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", in, " ", out));
    const auto dy = NormalValues<T>(tokens * out, "dy"), x = NormalValues<T>(tokens * in, "x");
    const auto initial = NormalValues<T>(out * in, "initial");
    StridedMatrix<T> dy_view(tokens, out, 2, dy), x_view(tokens, in, 0, x), dw_view(out, in, 3, initial);
    ANNULUS_CHECK_OK(LinearBackwardWeight(ctx, dy_view.ref(), x_view.ref(), dw_view.ref()));
    ExpectMatches<T>(dw_view.values(), [&]<class W>() {
      const auto dys = Cast<W>(dy), xs = Cast<W>(x);
      return reference::Gemm<W>({out, in, tokens}, Transposed(dys, out), Rows(xs, in), Cast<W>(initial));
    });
  }
}

TEST(LinearGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  constexpr int64_t kTokens = 3, kIn = 4, kOut = 5;
  Guarded<double> x({kTokens, kIn}, NormalValues<double>(kTokens * kIn, "x"));
  Guarded<double> w({kOut, kIn}, NormalValues<double>(kOut * kIn, "w"));
  Guarded<double> y({kTokens, kOut}), dy({kTokens, kOut}, NormalValues<double>(kTokens * kOut, "dy"));
  Guarded<double> dx({kTokens, kIn}), dw({kOut, kIn}, 0.0);
  ANNULUS_CHECK_OK(LinearBackwardInput(ctx, dy.ref(), w.ref(), Write::kOverwrite, dx.ref()));
  ANNULUS_CHECK_OK(LinearBackwardWeight(ctx, dy.ref(), x.ref(), dw.ref()));
  const auto objective = [&] {
    ANNULUS_CHECK_OK(LinearForward(ctx, x.ref(), w.ref(), Write::kOverwrite, y.ref()));
    return Dot(y.values(), dy.values());
  };
  ExpectGradient(objective, x.data(), dx.values());
  ExpectGradient(objective, w.data(), dw.values());
}

TEST(LinearArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> a({4, 4}, 0.0f), b({4, 4}, 0.0f), c({4, 4}, 0.0f);
  Guarded<double> wide({4, 4}, 0.0);
  const auto forward = [&](ConstMatrixRef x, ConstMatrixRef w, MatrixRef y) {
    return LinearForward(ctx, x, w, Write::kOverwrite, y);
  };
  EXPECT_TRUE(forward(a.ref(), b.ref(), c.ref()).ok());
  ExpectRefused(forward(a.ref(), b.ref().Rows(0, 3), c.ref()), kInvalid,
                "linear.y=f32[4, 4]: expected f32[4, 3]");
  ExpectRefused(forward(a.ref(), wide.ref(), c.ref()), kInvalid, "linear.w=f64[4, 4]: expected f32");
  const MatrixRef narrow{a.data(), DType::kF32, 4, 4, 3};
  ExpectRefused(forward(narrow, b.ref(), c.ref()), kInvalid, "linear.x.stride=3");
  // More rows than 32 bits count: refused before anything is read.
  constexpr int64_t kHuge = int64_t{1} << 31;
  const MatrixRef tall{a.data(), DType::kF32, kHuge, 4, 4}, tall_out{c.data(), DType::kF32, kHuge, 4, 4};
  ExpectRefused(forward(tall, b.ref(), tall_out), kInvalid, "expected counts in [0, 2147483647]");
  const MatrixRef far{a.data(), DType::kF32, 4, 4, kHuge};
  ExpectRefused(forward(far, b.ref(), c.ref()), kInvalid, "linear.x.stride=2147483648");
  EXPECT_TRUE(LinearBackwardWeight(ctx, a.ref(), b.ref(), c.ref()).ok());
  ExpectRefused(LinearBackwardWeight(ctx, a.ref(), b.ref(), wide.ref()), kInvalid,
                "linear.dw=f64[4, 4]: expected f32[4, 4]");
  const MatrixRef integers{a.data(), DType::kI32, 4, 4, 4};
  ExpectRefused(forward(integers, b.ref(), c.ref()), kInvalid, "expected f32 or f64");
}

}  // namespace
}  // namespace annulus::testing
