#include "ops/attention_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class AttentionBackwardTest : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionBackwardTest, FloatTypes);

// `got` is what was there before and the gradients of the reference. A dS sums products dO V.
template <typename T>
void ExpectGradients(const AttentionReference<T>& reference, const Operands<T>& in,
                     const AttentionResults<T>& before, const AttentionResults<T>& got) {
  const auto expect = [&](const std::vector<T>& values, const std::vector<T>& initial, std::vector<T> naive,
                          std::vector<Wide<T>> wide) {
    for (size_t i = 0; i < initial.size(); ++i) {
      naive[i] += initial[i];
      wide[i] += static_cast<Wide<T>>(initial[i]);
    }
    ExpectMatches<T>(values, naive, wide, MaxAbs(in.dout) * std::max(MaxAbs(in.v), 1.0));
  };
  expect(got.dq, before.dq, reference.naive.dq, reference.wide.dq);
  expect(got.dk, before.dk, reference.naive.dk, reference.wide.dk);
  expect(got.dv, before.dv, reference.naive.dv, reference.wide.dv);
}

TYPED_TEST(AttentionBackwardTest, AddsTheReferencesGradients) {
  using T = TypeParam;
  for (const AttentionShape& shape : EdgeShapes()) {
    for (const MaskKind mask : kAllMasks) {
      SCOPED_TRACE(absl::StrCat(shape.q_rows, " x ", shape.k_rows, " heads ", shape.heads, " mask ",
                                static_cast<int>(mask)));
      const AttentionProblem problem = MakeProblem(shape, mask, {11, 2});
      const auto in = RandomOperands<T>(problem);
      const BatchOrder order = shape.heads == 6 ? BatchOrder::kOutsideRows : BatchOrder::kInsideRows;
      AttentionRun<T> run(problem, in, order);
      run.dq.Set(NormalValues<T>(problem.q_elements(), "dq"));
      run.dk.Set(NormalValues<T>(problem.k_elements(), "dk"));
      run.dv.Set(NormalValues<T>(problem.v_elements(), "dv"));
      const auto before = run.Results();
      run.Forward();
      run.Backward();
      ExpectGradients(AttentionReference<T>(problem, in), in, before, run.Results());
    }
  }
}

TYPED_TEST(AttentionBackwardTest, FourChunksInEveryOrderEqualOneCall) {
  using T = TypeParam;
  const AttentionShape shape{
      .q_rows = 30, .k_rows = 90, .batch = 2, .heads = 4, .kv_heads = 2, .dim = 8, .v_dim = 6};
  for (const MaskKind mask : kAllMasks) {
    const AttentionProblem problem = MakeProblem(shape, mask, {5, 3});
    const auto in = RandomOperands<T>(problem);
    const AttentionReference<T> reference(problem, in);
    std::vector<int64_t> order = {0, 1, 2, 3};
    do {
      AttentionRun<T> run(problem, in);
      const auto before = run.Results();
      run.Forward(order);
      run.Backward(order);
      ExpectGradients(reference, in, before, run.Results());
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

// The chain forward, delta, backward against the objective <O, dO>, ring of two chunks included.
TEST(AttentionGradient, AgreesWithFiniteDifferences) {
  const AttentionShape shape{
      .q_rows = 5, .k_rows = 6, .batch = 2, .heads = 4, .kv_heads = 2, .dim = 3, .v_dim = 2};
  for (const MaskKind mask : {MaskKind::kFull, MaskKind::kCausal, MaskKind::kGaps}) {
    const AttentionProblem problem = MakeProblem(shape, mask);
    auto in = RandomOperands<double>(problem);
    AttentionRun<double> run(problem, in);
    run.Forward({1, 0});
    run.Backward({0, 1});
    const auto objective = [&] {
      AttentionRun<double> moved(problem, in);
      moved.Forward({1, 0});
      return Dot(moved.out.values(), in.dout);
    };
    ExpectGradient(objective, in.q.data(), run.dq.values());
    ExpectGradient(objective, in.k.data(), run.dk.values());
    ExpectGradient(objective, in.v.data(), run.dv.values());
  }
}

TYPED_TEST(AttentionBackwardTest, DeltaIsTheRowwiseProduct) {
  using T = TypeParam;
  const AttentionProblem problem = MakeProblem(
      {.q_rows = 3, .k_rows = 1, .batch = 2, .heads = 2, .kv_heads = 1, .v_dim = 19}, MaskKind::kFull);
  auto in = RandomOperands<T>(problem);
  AttentionRun<T> run(problem, in, BatchOrder::kOutsideRows);
  const auto out = NormalValues<T>(problem.out_elements(), "out");
  run.out.Set(out);
  ANNULUS_CHECK_OK(AttentionDelta(run.ctx, run.out.ref(), run.dout.ref(), run.delta.ref()));
  ExpectMatches<T>(
      run.delta.values(),
      [&]<class W>() {
        std::vector<W> delta(static_cast<size_t>(problem.stats()));
        for (size_t i = 0; i < out.size(); ++i)
          delta[i / 19] += static_cast<W>(out[i]) * static_cast<W>(in.dout[i]);
        return delta;
      },
      19 * MaxAbs(out));
}

// Rows whose LSE says that no block had a key get no gradient and give none, also where this block's bounds
// allow keys.
TYPED_TEST(AttentionBackwardTest, RowsWithoutKeysGiveZero) {
  using T = TypeParam;
  const AttentionProblem problem =
      MakeProblem({.q_rows = 4, .k_rows = 7, .heads = 2, .kv_heads = 1}, MaskKind::kFull);
  AttentionRun<T> run(problem, RandomOperands<T>(problem));
  ANNULUS_CHECK_OK(ResetPartial(run.ctx, run.partial()));
  run.Backward();
  EXPECT_EQ(run.dq.values(), std::vector<T>(static_cast<size_t>(problem.q_elements())));
  EXPECT_EQ(run.dk.values(), std::vector<T>(static_cast<size_t>(problem.k_elements())));
  EXPECT_EQ(run.dv.values(), std::vector<T>(static_cast<size_t>(problem.v_elements())));
}

TEST(AttentionBackward, PollsAndRepeatsBitForBit) {
  const AttentionProblem problem =
      MakeProblem({.q_rows = 200, .k_rows = 200, .heads = 4, .kv_heads = 2}, MaskKind::kCausal);
  const auto in = RandomOperands<float>(problem);
  AttentionRun<float> first(problem, in), second(problem, in);
  first.Forward();
  int polls = 0;
  first.ctx.progress = [&] { ++polls; };
  first.Backward();
  EXPECT_EQ(polls, 2 * (1 + 1 + 2 +
                        2));  // KV heads x tiles of keys under the diagonal, for tiles of 64 rows x 2 heads
  second.Forward();
  second.Backward();
  const auto a = first.Results(), b = second.Results();
  EXPECT_TRUE(SameBits(a.dq, b.dq) && SameBits(a.dk, b.dk) && SameBits(a.dv, b.dv));
}

TEST(AttentionBackwardArguments, AreRefusedByName) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const AttentionProblem problem =
      MakeProblem({.q_rows = 2, .k_rows = 3, .heads = 4, .kv_heads = 2}, MaskKind::kFull);
  AttentionRun<float> run(problem, RandomOperands<float>(problem));
  const auto refused = [&](const auto& change, absl::string_view text) {
    AttentionGradients gradients = run.Gradients(0, 3);
    change(gradients);
    ExpectRefused(AttentionBackward(run.ctx, run.Block(0, 3), gradients), kInvalid, text);
  };
  refused([](AttentionGradients& g) { g.dout.dim = 3; }, "attention.dout=f32[2, 1, 4, 3]");
  refused([](AttentionGradients& g) { g.dq.rows = 1; }, "attention.dq=f32[1, 1, 4, 4]");
  refused([](AttentionGradients& g) { g.dk.heads = 1; }, "attention.dk=f32[3, 1, 1, 4]");
  refused([](AttentionGradients& g) { g.dv.dtype = DType::kF64; },
          "attention.dv=f64[3, 1, 2, 4]: expected f32");
  refused([](AttentionGradients& g) { g.lse = g.lse.Rows(0, 1); }, "attention.lse=f32[1, 1, 4]");
  refused([](AttentionGradients& g) { g.delta = g.delta.Rows(0, 1); }, "attention.delta=f32[1, 1, 4]");
}

}  // namespace
}  // namespace annulus::testing
