// Forward and backward of block attention against a naive reference.

#include "annulus/ops/attention.h"

#include <numeric>

#include "ops/attention_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class AttentionTest : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionTest, FloatTypes);

// Fills what the backward adds to.
template <typename T>
void SetGradients(const AttentionProblem& problem, AttentionRun<T>& run) {
  run.dq.Set(NormalValues<T>(problem.q_elements(), "dq"));
  run.dk.Set(NormalValues<T>(problem.k_elements(), "dk"));
  run.dv.Set(NormalValues<T>(problem.v_elements(), "dv"));
}

TYPED_TEST(AttentionTest, OneBlockMatchesTheReference) {
  using T = TypeParam;
  for (const AttentionShape& shape : EdgeShapes()) {
    for (const MaskKind mask : kAllMasks) {
      for (const KeyPositions positions : {KeyPositions{0, 1}, KeyPositions{37, 4}}) {
        SCOPED_TRACE(absl::StrCat(shape.q_rows, " x ", shape.k_rows, " heads ", shape.heads, " mask ",
                                  static_cast<int>(mask), " stride ", positions.stride));
        const AttentionProblem problem = MakeProblem(shape, mask, positions);
        const auto in = RandomOperands<T>(problem);
        const AttentionReference<T> reference(problem, in);
        const BatchOrder order = shape.heads == 6 ? BatchOrder::kOutsideRows : BatchOrder::kInsideRows;
        AttentionRun<T> run(problem, in, order);
        SetGradients(problem, run);
        const auto before = run.Results();
        run.Forward();
        run.Backward();
        ExpectPartial(reference, in, run.Results());
        ExpectGradients(reference, in, before, run.Results());
      }
    }
  }
}

TYPED_TEST(AttentionTest, FourChunksInEveryOrderEqualOneCall) {
  using T = TypeParam;
  const AttentionShape shape{
      .q_rows = 50, .k_rows = 150, .batch = 2, .heads = 4, .kv_heads = 2, .dim = 8, .v_dim = 6};
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
      ExpectPartial(reference, in, run.Results());
      ExpectGradients(reference, in, before, run.Results());
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

// What the outputs held is overwritten, not read.
TYPED_TEST(AttentionTest, WholeBlocksEqualCarriedOnes) {
  using T = TypeParam;
  const AttentionShape shape{
      .q_rows = 130, .k_rows = 131, .batch = 2, .heads = 4, .kv_heads = 2, .dim = 8, .v_dim = 6};
  for (const MaskKind mask : kAllMasks) {
    const AttentionProblem problem = MakeProblem(shape, mask);
    const auto in = RandomOperands<T>(problem);
    AttentionRun<T> carried(problem, in), whole(problem, in);
    carried.Forward();
    carried.Backward();
    SetGradients(problem, whole);
    whole.ForwardWhole();
    whole.BackwardWhole();
    const auto a = carried.Results(), b = whole.Results();
    EXPECT_TRUE(SameBits(a.out, b.out) && SameBits(a.lse, b.lse));
    EXPECT_TRUE(SameBits(a.dq, b.dq) && SameBits(a.dk, b.dk) && SameBits(a.dv, b.dv));
  }
}

// A ring of any length obeys the rule for one call, and its output stays better than the naive sum over all
// keys at once. (The LSE itself is rounded once for each chunk: about half a unit in its last place each, in
// random directions.)
TEST(Attention, ErrorDoesNotGrowWithTheNumberOfChunks) {
  const AttentionShape shape{.q_rows = 64, .k_rows = 4096, .heads = 2, .kv_heads = 1, .dim = 32, .v_dim = 32};
  for (const MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
    const AttentionProblem problem = MakeProblem(shape, mask);
    const auto in = RandomOperands<float>(problem);
    const AttentionReference<float> reference(problem, in);
    for (const size_t chunks : {2, 8, 64}) {
      SCOPED_TRACE(chunks);
      std::vector<int64_t> order(chunks);
      std::iota(order.begin(), order.end(), 0);
      AttentionRun<float> run(problem, in);
      run.Forward(order);
      EXPECT_LE(MaxDifference(run.out.values(), reference.wide.out),
                MaxDifference(reference.naive.out, reference.wide.out));
      ExpectMatches<float>(run.lse.values(), reference.naive.lse, reference.wide.lse);
    }
  }
}

// Scores of several thousand overflow exp without the running maximum, whichever chunk holds the largest.
TYPED_TEST(AttentionTest, LargeScoresDoNotOverflow) {
  using T = TypeParam;
  const AttentionProblem problem =
      MakeProblem({.q_rows = 1, .k_rows = 4, .dim = 1, .v_dim = 1}, MaskKind::kFull);
  const Operands<T> in{{T{1}}, {T{-9000}, T{9000}, T{0}, T{9000}}, {T{1}, T{2}, T{3}, T{4}}, {T{1}}};
  std::vector<int64_t> order = {0, 1, 2, 3};
  do {
    AttentionRun<T> run(problem, in);
    run.Forward(order);
    EXPECT_EQ(run.out.values()[0], T{3});
    EXPECT_NEAR(run.lse.values()[0], 9000 + std::log(2.0), 1e-3);
  } while (std::next_permutation(order.begin(), order.end()));
}

TYPED_TEST(AttentionTest, KeysAndValuesMayShareABuffer) {
  using T = TypeParam;
  const AttentionShape shape{
      .q_rows = 8, .k_rows = 20, .batch = 2, .heads = 2, .kv_heads = 2, .dim = 4, .v_dim = 4};
  const AttentionProblem problem = MakeProblem(shape, MaskKind::kCausal);
  auto in = RandomOperands<T>(problem);
  Guarded<T> fused({20, 2, 16}, NormalValues<T>(20 * 2 * 16, "kv"));
  for (size_t i = 0; i < in.k.size(); ++i) {
    in.k[i] = fused.values()[i / 8 * 16 + i % 8];
    in.v[i] = fused.values()[i / 8 * 16 + 8 + i % 8];
  }
  AttentionRun<T> run(problem, in);
  AttentionBlock block = run.WholeBlock();
  block.k = HeadsOf(fused.ref(), 0, 2, 4);
  block.v = HeadsOf(fused.ref(), 8, 2, 4);
  ANNULUS_CHECK_OK(ResetPartial(run.ctx, run.partial()));
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, block, run.partial()));
  ExpectPartial(AttentionReference<T>(problem, in), in, run.Results());
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

TYPED_TEST(AttentionTest, DeltaIsTheRowwiseProduct) {
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

}  // namespace
}  // namespace annulus::testing
