#include "annulus/ops/state.h"

#include "ops/recurrent_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class StateTest : public ::testing::Test {};
TYPED_TEST_SUITE(StateTest, FloatTypes);

struct Dims {
  int64_t count = 0, k = 0, v = 0;
  int64_t elements() const { return count * k * v; }
};

// transition: one factor or K x K elements of each state
template <typename W>
std::vector<W> Advanced(const Dims& d, const std::vector<W>& transition, Transpose transpose,
                        const std::vector<W>& in, const std::vector<W>& state) {
  const bool scalar = static_cast<int64_t>(transition.size()) == d.count;
  std::vector<W> out(state.size());
  for (int64_t i = 0; i < d.elements(); ++i) {
    const int64_t item = i / (d.k * d.v), row = i / d.v % d.k, column = i % d.v;
    W sum = state[static_cast<size_t>(i)];
    for (int64_t j = 0; j < d.k; ++j) {
      const int64_t element = transpose == Transpose::kNo ? row * d.k + j : j * d.k + row;
      const W factor = scalar ? (j == row ? transition[static_cast<size_t>(item)] : W{0})
                              : transition[static_cast<size_t>(item * d.k * d.k + element)];
      sum += factor * in[static_cast<size_t>((item * d.k + j) * d.v + column)];
    }
    out[static_cast<size_t>(i)] = sum;
  }
  return out;
}

Shape TransitionShape(bool matrices, const Dims& d) {
  return matrices ? Shape{2, d.count / 2, d.k * d.k} : Shape{2, d.count / 2};
}

TYPED_TEST(StateTest, AdvanceMatchesLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const Dims d : {Dims{0, 3, 4}, Dims{2, 1, 1}, Dims{6, 3, 5}, Dims{2, 17, 16}}) {
    for (const bool matrices : {false, true}) {
      for (const Transpose transpose : {Transpose::kNo, Transpose::kYes}) {
        SCOPED_TRACE(absl::StrCat(d.count, " ", d.k, " ", d.v, matrices ? " matrices" : ""));
        const Shape shape{2, d.count / 2, d.k, d.v}, by = TransitionShape(matrices, d);
        Guarded<T> transition(by, NormalValues<T>(by.elements(), "transition"));
        Guarded<T> in(shape, NormalValues<T>(d.elements(), "in")), out(shape);
        Guarded<T> state(shape, NormalValues<T>(d.elements(), "state"));
        ANNULUS_CHECK_OK(AdvanceState(ctx, transition.ref(), transpose, in.ref(), state.ref(), out.ref()));
        const auto by_loops = [&]<class W>() {
          return Advanced<W>(d, Cast<W>(transition.values()), transpose, Cast<W>(in.values()),
                             Cast<W>(state.values()));
        };
        const auto bound = Advanced<T>(d, Absolute(transition.values()), transpose, Absolute(in.values()),
                                       Absolute(state.values()));
        ExpectMatches<T>(out.values(), by_loops, MaxAbs(bound));
      }
    }
  }
}

TYPED_TEST(StateTest, AdvancesInPlaceOfEitherInput) {
  using T = TypeParam;
  Context ctx{Device{}};
  const Dims d{4, 3, 2};
  const Shape shape{2, 2, d.k, d.v};
  for (const bool matrices : {false, true}) {
    const Shape by = TransitionShape(matrices, d);
    Guarded<T> transition(by, NormalValues<T>(by.elements(), "transition")), out(shape);
    Guarded<T> in(shape, NormalValues<T>(d.elements(), "in"));
    Guarded<T> state(shape, NormalValues<T>(d.elements(), "state"));
    const auto before = in.values();
    const auto advance = [&](Guarded<T>& to) {
      ANNULUS_CHECK_OK(AdvanceState(ctx, transition.ref(), Transpose::kNo, in.ref(), state.ref(), to.ref()));
    };
    advance(out);
    advance(in);
    EXPECT_TRUE(SameBits(in.values(), out.values()));
    in.Set(before);
    advance(state);
    EXPECT_TRUE(SameBits(state.values(), out.values()));
  }
}

// Also where the transition is not a number: it meets no state.
TYPED_TEST(StateTest, UndefinedInIsZero) {
  using T = TypeParam;
  Context ctx{Device{}};
  const Shape shape{1, 2, 3, 2};
  Guarded<T> transition({1, 2}), state(shape, NormalValues<T>(12, "state")), out(shape);
  const auto advance = [&](TensorRef to) {
    ANNULUS_CHECK_OK(AdvanceState(ctx, transition.ref(), Transpose::kNo, {}, state.ref(), to));
  };
  advance(out.ref());
  EXPECT_TRUE(SameBits(out.values(), state.values()));
  advance(state.ref());
  EXPECT_TRUE(SameBits(out.values(), state.values()));
}

// later(earlier(x)) is (later after earlier)(x), for both kinds of transition.
TEST(ComposeTransitions, IsOneAfterTheOther) {
  Context ctx{Device{}};
  const Dims d{6, 5, 3};
  const Shape shape{2, 3, d.k, d.v};
  for (const bool matrices : {false, true}) {
    const Shape by = TransitionShape(matrices, d);
    Guarded<double> later(by, NormalValues<double>(by.elements(), "later")), both(by);
    Guarded<double> earlier(by, NormalValues<double>(by.elements(), "earlier"));
    Guarded<double> zero(shape, 0.0), x(shape, NormalValues<double>(d.elements(), "x")), at_once(shape);
    ANNULUS_CHECK_OK(ComposeTransitions(ctx, later.ref(), earlier.ref(), both.ref()));
    ANNULUS_CHECK_OK(AdvanceState(ctx, both.ref(), Transpose::kNo, x.ref(), zero.ref(), at_once.ref()));
    for (Guarded<double>* step : {&earlier, &later}) {
      ANNULUS_CHECK_OK(AdvanceState(ctx, step->ref(), Transpose::kNo, x.ref(), zero.ref(), x.ref()));
    }
    ExpectClose(at_once.values(), x.values());
  }
}

// <T x, y> = <x, T^T y>, in small integers exactly.
TEST(AdvanceState, TransposedIsTheAdjoint) {
  Context ctx{Device{}};
  const Shape shape{1, 2, 4, 3};
  const auto integers = [](int64_t n, absl::string_view stream) {
    std::vector<double> values = NormalValues<double>(n, stream, 3);
    for (double& x : values) x = std::round(x);
    return values;
  };
  Guarded<double> matrix({1, 2, 16}, integers(32, "matrix")), zero(shape, 0.0);
  Guarded<double> x(shape, integers(24, "x")), y(shape, integers(24, "y")), tx(shape), ty(shape);
  ANNULUS_CHECK_OK(AdvanceState(ctx, matrix.ref(), Transpose::kNo, x.ref(), zero.ref(), tx.ref()));
  ANNULUS_CHECK_OK(AdvanceState(ctx, matrix.ref(), Transpose::kYes, y.ref(), zero.ref(), ty.ref()));
  EXPECT_EQ(Dot(tx.values(), y.values()), Dot(x.values(), ty.values()));
  EXPECT_NE(Dot(tx.values(), y.values()), 0);
}

TEST(StateArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> state({1, 2, 3, 4}, 1.0f), scalar({1, 2}, 1.0f), matrix({1, 2, 9}, 1.0f);
  Guarded<float> wide({1, 2, 16}, 1.0f), odd({1, 2, 8}, 1.0f), flat({2, 12}, 1.0f);
  const auto advance = [&](ConstTensorRef transition, ConstTensorRef in, ConstTensorRef s) {
    return AdvanceState(ctx, transition, Transpose::kNo, in, s, state.ref());
  };
  ExpectRefused(advance(scalar.ref(), {}, flat.ref()), kInvalid, "advance_state.state=[2, 12]");
  ExpectRefused(advance(wide.ref(), {}, state.ref()), kInvalid,
                "advance_state.transition=f32[1, 2, 16] on cpu: expected f32[1, 2, 9] on cpu");
  ExpectRefused(advance(scalar.ref(), flat.ref(), state.ref()), kInvalid, "advance_state.in=f32[2, 12]");
  ExpectRefused(ComposeTransitions(ctx, odd.ref(), odd.ref(), wide.ref()), kInvalid,
                "compose_transitions.later=[1, 2, 8]");
  ExpectRefused(ComposeTransitions(ctx, matrix.ref(), wide.ref(), matrix.ref()), kInvalid,
                "compose_transitions.earlier=f32[1, 2, 16]");
  ExpectRefused(ComposeTransitions(ctx, matrix.ref(), matrix.ref(), matrix.ref()), kInvalid,
                "compose_transitions.out is one of the transitions");
}

}  // namespace
}  // namespace annulus::testing
