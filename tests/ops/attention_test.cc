#include "annulus/ops/attention.h"

#include <numeric>

#include "ops/attention_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class AttentionTest : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionTest, FloatTypes);

// v is averaged: its largest element bounds what an output sums.
template <typename T>
void ExpectPartial(const AttentionReference<T>& reference, const Operands<T>& in, AttentionRun<T>& run) {
  ExpectMatches<T>(run.out.values(), reference.naive.out, reference.wide.out, MaxAbs(in.v));
  ExpectMatches<T>(run.lse.values(), reference.naive.lse, reference.wide.lse);
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
        const BatchOrder order = shape.heads == 6 ? BatchOrder::kOutsideRows : BatchOrder::kInsideRows;
        AttentionRun<T> run(problem, in, order);
        run.Forward();
        ExpectPartial(AttentionReference<T>(problem, in), in, run);
      }
    }
  }
}

TYPED_TEST(AttentionTest, FourChunksInEveryOrderEqualOneCall) {
  using T = TypeParam;
  const AttentionShape shape{
      .q_rows = 50, .k_rows = 150, .batch = 2, .heads = 4, .kv_heads = 2, .dim = 8, .v_dim = 8};
  for (const MaskKind mask : kAllMasks) {
    const AttentionProblem problem = MakeProblem(shape, mask, {5, 3});
    const auto in = RandomOperands<T>(problem);
    const AttentionReference<T> reference(problem, in);
    std::vector<int64_t> order = {0, 1, 2, 3};
    do {
      AttentionRun<T> run(problem, in);
      run.Forward(order);
      ExpectPartial(reference, in, run);
    } while (std::next_permutation(order.begin(), order.end()));
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

// Bit patterns that any arithmetic would change: a signalling carry, negative zero, subnormals.
template <typename T>
std::vector<T> OddValues(size_t n) {
  const T values[] = {-T{0}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::quiet_NaN(),
                      T{0.1}};
  std::vector<T> odd(n);
  for (size_t i = 0; i < n; ++i) odd[i] = values[i % 4];
  return odd;
}

TYPED_TEST(AttentionTest, FullyMaskedBlockLeavesEveryBit) {
  using T = TypeParam;
  AttentionProblem problem =
      MakeProblem({.q_rows = 130, .k_rows = 130, .heads = 2, .kv_heads = 1}, MaskKind::kFull);
  for (size_t i = 0; i < problem.lo.size(); ++i) {
    problem.lo[i] = i % 2 == 0 ? 130 : 7;  // after the block, or an empty range inside it
    problem.hi[i] = i % 2 == 0 ? 500 : 7;
  }
  AttentionRun<T> run(problem, RandomOperands<T>(problem));
  const auto out = OddValues<T>(static_cast<size_t>(problem.out_elements()));
  const auto lse = OddValues<T>(static_cast<size_t>(problem.stats()));
  run.out.Set(out);
  run.lse.Set(lse);
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, run.Block(0, 130), run.partial()));
  EXPECT_TRUE(SameBits(run.out.values(), out));
  EXPECT_TRUE(SameBits(run.lse.values(), lse));
}

// The rows that MaskKind::kGaps masks, or the others, of a dense tensor with `rows` rows.
enum class Pick { kMasked, kOthers };
template <typename W>
std::vector<W> PickRows(const std::vector<W>& values, size_t rows, Pick pick) {
  std::vector<W> picked;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool masked = i / (values.size() / rows) % 3 == 1;
    if (masked == (pick == Pick::kMasked)) picked.push_back(values[i]);
  }
  return picked;
}

// Rows without keys keep their bits inside a tile whose other rows go on from their carry.
TYPED_TEST(AttentionTest, MaskedRowsKeepTheirBitsBesideOthers) {
  using T = TypeParam;
  constexpr size_t kRows = 20;
  const AttentionShape shape{.q_rows = kRows, .k_rows = 140, .batch = 2, .heads = 2, .kv_heads = 1};
  const AttentionProblem whole = MakeProblem(shape, MaskKind::kFull),
                         gaps = MakeProblem(shape, MaskKind::kGaps);
  const auto in = RandomOperands<T>(whole);
  AttentionRun<T> run(gaps, in);
  ANNULUS_CHECK_OK(ResetPartial(run.ctx, run.partial()));
  AttentionBlock first_half = run.Block(0, 70);
  first_half.bounds = {whole.lo, whole.hi};
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, first_half, run.partial()));
  const auto before = run.Results();
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, run.Block(70, 140), run.partial()));
  const auto after = run.Results();
  const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
    return SameBits(PickRows(a, kRows, Pick::kMasked), PickRows(b, kRows, Pick::kMasked));
  };
  EXPECT_TRUE(same(before.out, after.out));
  EXPECT_TRUE(same(before.lse, after.lse));
  const AttentionReference<T> reference(whole, in);
  const auto others = [](const auto& values) { return PickRows(values, kRows, Pick::kOthers); };
  ExpectMatches<T>(others(after.out), others(reference.naive.out), others(reference.wide.out));
  ExpectMatches<T>(others(after.lse), others(reference.naive.lse), others(reference.wide.lse));
}

// Keys that no query sees are not read: NaN there stays there.
TYPED_TEST(AttentionTest, KeysOutsideEveryRangeAreNotRead) {
  using T = TypeParam;
  AttentionProblem problem = MakeProblem({.q_rows = 9, .k_rows = 200, .dim = 3, .v_dim = 2}, MaskKind::kFull);
  std::fill(problem.lo.begin(), problem.lo.end(), 20);
  std::fill(problem.hi.begin(), problem.hi.end(), 180);
  const auto in = RandomOperands<T>(problem);
  auto poisoned = in;
  for (int64_t key = 0; key < 200; ++key) {
    if (key >= 20 && key < 180) continue;
    std::fill_n(poisoned.k.begin() + key * 3, 3, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(poisoned.v.begin() + key * 2, 2, std::numeric_limits<T>::quiet_NaN());
  }
  AttentionRun<T> run(problem, poisoned);
  run.Forward();
  ExpectPartial(AttentionReference<T>(problem, in), in, run);
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
  AttentionBlock block = run.Block(0, 20);
  block.k = HeadsOf(fused.ref(), 0, 2, 4);
  block.v = HeadsOf(fused.ref(), 8, 2, 4);
  ANNULUS_CHECK_OK(ResetPartial(run.ctx, run.partial()));
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, block, run.partial()));
  ExpectPartial(AttentionReference<T>(problem, in), in, run);
}

TEST(Attention, PollsBetweenTilesAndRepeatsBitForBit) {
  const AttentionProblem problem =
      MakeProblem({.q_rows = 300, .k_rows = 300, .heads = 2, .kv_heads = 1}, MaskKind::kCausal);
  const auto in = RandomOperands<float>(problem);
  AttentionRun<float> first(problem, in), second(problem, in);
  int polls = 0;
  first.ctx.progress = [&] { ++polls; };
  first.Forward();
  EXPECT_EQ(polls, 1 + 1 + 2 + 2 + 3);  // tiles of keys under the diagonal, for tiles of 64 rows x 2 heads
  second.Forward();
  EXPECT_TRUE(SameBits(first.out.values(), second.out.values()));
  EXPECT_TRUE(SameBits(first.lse.values(), second.lse.values()));
}

TEST(AttentionArguments, AreRefusedByName) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const AttentionProblem problem =
      MakeProblem({.q_rows = 2, .k_rows = 3, .heads = 4, .kv_heads = 2}, MaskKind::kFull);
  AttentionRun<float> run(problem, RandomOperands<float>(problem));
  const auto refused = [&](const auto& change, absl::string_view text) {
    AttentionBlock block = run.Block(0, 3);
    change(block);
    ExpectRefused(AttentionForward(run.ctx, block, run.partial()), kInvalid, text);
  };
  refused([](AttentionBlock& b) { b.k.dim = 3; }, "attention.k=f32[3, 1, 2, 3]: expected f32[3, 1, 2, 4]");
  refused([](AttentionBlock& b) { b.v.rows = 2; }, "attention.v=f32[2, 1, 2, 4]");
  refused([](AttentionBlock& b) { b.v.dim = 3; }, "attention.out=f32[2, 1, 4, 4]: expected f32[2, 1, 4, 3]");
  refused([](AttentionBlock& b) { b.q.dtype = DType::kI32; }, "attention.q.dtype=i32");
  refused([](AttentionBlock& b) { b.k.heads = b.v.heads = 3; },
          "attention.heads=4: expected a multiple of the 3");
  refused([](AttentionBlock& b) { b.bounds.lo.remove_suffix(1); }, "attention.bounds.lo.size=1: expected 2");
  refused([](AttentionBlock& b) { b.bounds.hi = {}; }, "attention.bounds.hi.size=0: expected 2");
  refused([](AttentionBlock& b) { b.key_positions.stride = 0; },
          "stride=0: expected offset >= 0 and stride >= 1");
  refused([](AttentionBlock& b) { b.key_positions.offset = -1; }, "offset=-1");
  refused([](AttentionBlock& b) { b.k.row_stride = 7; }, "attention.k.row_stride=7: expected at least 8");
  refused([](AttentionBlock& b) { b.k.row_stride = int64_t{1} << 31; }, "attention.k.row_stride=2147483648");
  AttentionPartial partial = run.partial();
  partial.lse = partial.lse.Rows(0, 1);
  ExpectRefused(ResetPartial(run.ctx, partial), kInvalid, "attention.lse=f32[1, 1, 4]");
}

}  // namespace
}  // namespace annulus::testing
