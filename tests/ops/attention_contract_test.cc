// What annulus/ops/attention.h promises besides the numbers: bits that stay, keys that are not read, repeats,
// and refusals.

#include "annulus/ops/attention.h"
#include "ops/attention_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class AttentionContractTest : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionContractTest, FloatTypes);

// Bit patterns that any arithmetic would change: a signalling carry, negative zero, subnormals.
template <typename T>
std::vector<T> OddValues(size_t n) {
  const T values[] = {-T{0}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::quiet_NaN(),
                      T{0.1}};
  std::vector<T> odd(n);
  for (size_t i = 0; i < n; ++i) odd[i] = values[i % 4];
  return odd;
}

TYPED_TEST(AttentionContractTest, FullyMaskedBlockLeavesEveryBit) {
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
TYPED_TEST(AttentionContractTest, MaskedRowsKeepTheirBitsBesideOthers) {
  using T = TypeParam;
  constexpr size_t kRows = 20;
  const AttentionShape shape{.q_rows = kRows, .k_rows = 140, .batch = 2, .heads = 2, .kv_heads = 1};
  const AttentionProblem whole = MakeProblem(shape, MaskKind::kFull),
                         gaps = MakeProblem(shape, MaskKind::kGaps);
  const auto in = RandomOperands<T>(whole);
  AttentionRun<T> run(gaps, in);
  ANNULUS_CHECK_OK(ResetPartial(run.ctx, run.partial()));
  AttentionBlock first_half = run.Block(0, 70);
  Guarded<int64_t> lo({whole.tokens()}, whole.lo), hi({whole.tokens()}, whole.hi);
  first_half.bounds = {lo.ref(), hi.ref()};
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

// A carry with sums loses nothing: blocks of whole tiles, in order, are one call to the bit. Rows without
// keys end as empty results.
TYPED_TEST(AttentionContractTest, BlocksWithSumsAreOneCall) {
  using T = TypeParam;
  for (const MaskKind mask : {MaskKind::kFull, MaskKind::kCausal, MaskKind::kGaps}) {
    const AttentionProblem problem =
        MakeProblem({.q_rows = 150, .k_rows = 4 * 128, .heads = 2, .kv_heads = 1}, mask);
    const auto in = RandomOperands<T>(problem);
    AttentionRun<T> whole(problem, in), blocks(problem, in);
    whole.ForwardWhole();
    AttentionPartial partial = blocks.partial();
    partial.sum = blocks.delta.ref();
    ANNULUS_CHECK_OK(ResetPartial(blocks.ctx, partial));
    for (int64_t begin = 0; begin < 4 * 128; begin += 128) {
      ANNULUS_CHECK_OK(AttentionForward(blocks.ctx, blocks.Block(begin, begin + 128), partial));
    }
    ANNULUS_CHECK_OK(FinishPartial(blocks.ctx, partial));
    EXPECT_TRUE(SameBits(blocks.out.values(), whole.out.values()));
    EXPECT_TRUE(SameBits(blocks.lse.values(), whole.lse.values()));
  }
}

// Keys that no query sees are not read: NaN there stays there.
TYPED_TEST(AttentionContractTest, KeysOutsideEveryRangeAreNotRead) {
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
  ExpectPartial(AttentionReference<T>(problem, in), in, run.Results());
}

// Rows whose LSE says that no block had a key get no gradient and give none, also where this block's bounds
// allow keys.
TYPED_TEST(AttentionContractTest, RowsWithoutKeysGiveZero) {
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

TEST(AttentionContract, PollsBetweenTilesAndRepeatsBitForBit) {
  const AttentionProblem problem =
      MakeProblem({.q_rows = 200, .k_rows = 200, .heads = 4, .kv_heads = 2}, MaskKind::kCausal);
  const auto in = RandomOperands<float>(problem);
  AttentionRun<float> first(problem, in), second(problem, in);
  int polls = 0;
  first.ctx.progress = [&] { ++polls; };
  // KV heads x tiles of keys under the diagonal, for tiles of 64 rows x 2 heads
  constexpr int kTiles = 2 * (1 + 1 + 2 + 2);
  first.Forward();
  EXPECT_EQ(polls, kTiles);
  first.Backward();
  EXPECT_EQ(polls, 2 * kTiles);
  second.Forward();
  second.Backward();
  const auto a = first.Results(), b = second.Results();
  EXPECT_TRUE(SameBits(a.out, b.out) && SameBits(a.lse, b.lse));
  EXPECT_TRUE(SameBits(a.dq, b.dq) && SameBits(a.dk, b.dk) && SameBits(a.dv, b.dv));
}

AttentionKernelCase OnGpu(int64_t dim, int64_t v_dim) {
  return {.device = DeviceKind::kCuda,
          .cudnn = true,
          .dtype = DType::kBF16,
          .dim = dim,
          .v_dim = v_dim,
          .mask_shape = MaskShape::kCausal};
}

TEST(AttentionKernelChoice, DependsOnDeviceDtypeMaskAndDeterminism) {
  AttentionKernelCase c = OnGpu(128, 128);
  EXPECT_EQ(Name(ChooseAttentionKernel(c)), "cudnn");
  AttentionKernelCase general = c, required = c, dims = c, without = c;
  general.mask_shape = MaskShape::kGeneral;
  required.determinism = Determinism::kRequired;
  dims.dim = 96;
  without.cudnn = false;
  for (const AttentionKernelCase& other : {general, required, dims, without}) {
    EXPECT_EQ(Name(ChooseAttentionKernel(other)), "cuda mma");
  }
  c.dtype = DType::kF32;
  EXPECT_EQ(Name(ChooseAttentionKernel(c)), "cuda f32");
  c.device = DeviceKind::kCpu;
  EXPECT_EQ(Name(ChooseAttentionKernel(c)), "cpu tiles");
}

// Of what it computes, all where there is no library that is faster.
TEST(AttentionKernelChoice, OnHopperItsOwnKernelServesEveryMaskAndOrder) {
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    for (const MaskShape shape : {MaskShape::kGeneral, MaskShape::kFull, MaskShape::kCausal}) {
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        for (const Determinism determinism : {Determinism::kOff, Determinism::kRequired}) {
          AttentionKernelCase c = OnGpu(dim, v_dim);
          c.hopper = true, c.mask_shape = shape, c.pass = pass, c.determinism = determinism;
          const AttentionKernel with_library = ChooseAttentionKernel(c);
          c.cudnn = false;
          EXPECT_EQ(Name(ChooseAttentionKernel(c)), "hopper");
          const bool library_serves = shape != MaskShape::kGeneral && determinism == Determinism::kOff;
          EXPECT_TRUE(with_library == AttentionKernel::kHopper ||
                      (library_serves && with_library == AttentionKernel::kCudnn));
        }
      }
    }
  }
  AttentionKernelCase other = OnGpu(96, 96);
  other.hopper = true;
  EXPECT_EQ(Name(ChooseAttentionKernel(other)), "cuda mma") << "refused by its own message";
  other = OnGpu(128, 128);
  other.hopper = true, other.dtype = DType::kF32;
  EXPECT_EQ(Name(ChooseAttentionKernel(other)), "cuda f32");
}

TEST(AttentionKernelChoice, TakesWhatIsAskedForOrSaysWhyNot) {
  AttentionKernelCase c = OnGpu(128, 128);
  c.hopper = true;
  for (const auto& [asked, name] : {std::pair(AttentionChoice::kHopper, "hopper"),
                                    {AttentionChoice::kCudnn, "cudnn"},
                                    {AttentionChoice::kTensorCore, "cuda mma"}}) {
    c.asked = asked;
    EXPECT_EQ(Name(ChooseAttentionKernel(c)), name);
    EXPECT_TRUE(CheckAttentionChoice(c).ok());
  }
  const auto refused = [](AttentionKernelCase c, AttentionChoice asked, const auto& change,
                          absl::string_view text) {
    c.asked = asked;
    change(c);
    ExpectRefused(CheckAttentionChoice(c), absl::StatusCode::kInvalidArgument, text);
  };
  refused(
      c, AttentionChoice::kHopper, [](AttentionKernelCase& x) { x.hopper = false; },
      "attention_kernel=HOPPER: expected a GPU of compute capability 9.0 and a program built for 90a");
  refused(
      c, AttentionChoice::kCudnn, [](AttentionKernelCase& x) { x.cudnn = false; },
      "attention_kernel=CUDNN: expected a program built with cuDNN");
  refused(
      c, AttentionChoice::kCudnn, [](AttentionKernelCase& x) { x.mask_shape = MaskShape::kGeneral; },
      "attention_kernel=CUDNN: expected full and causal blocks, not those of other masks");
  refused(
      c, AttentionChoice::kCudnn, [](AttentionKernelCase& x) { x.determinism = Determinism::kRequired; },
      "attention_kernel=CUDNN: expected sums in any order: deterministic: false");
  refused(
      c, AttentionChoice::kTensorCore, [](AttentionKernelCase& x) { x.dtype = DType::kF32; },
      "attention_kernel=CUDA_MMA: expected bf16 on a GPU");
  refused(
      c, AttentionChoice::kHopper, [](AttentionKernelCase& x) { x.device = DeviceKind::kCpu; },
      "attention_kernel=HOPPER: expected bf16 on a GPU");
}

TEST(AttentionKernelChoice, OfAContextIsRefusedByTheOp) {
  const AttentionProblem problem = MakeProblem({.q_rows = 2, .k_rows = 3}, MaskKind::kFull);
  AttentionRun<float> run(problem, RandomOperands<float>(problem));
  run.ctx.attention = AttentionChoice::kHopper;
  ExpectRefused(AttentionForward(run.ctx, run.Block(0, 3), run.partial()), absl::StatusCode::kInvalidArgument,
                "attention_kernel=HOPPER: expected bf16 on a GPU");
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
  refused([](AttentionBlock& b) { b.bounds.lo = b.bounds.lo.Rows(0, 1); },
          "attention.bounds.lo=i64[1] on cpu: expected i64[2] on cpu");
  refused([&](AttentionBlock& b) { b.bounds.hi = run.lse.ref(); }, "attention.bounds.hi=f32[2, 1, 4]");
  refused([](AttentionBlock& b) { b.mask_shape = MaskShape::kCausal; },
          "attention.mask_shape=causal with 2 query and 3 key rows: expected as many of both");
  refused([](AttentionBlock& b) { b.key_positions.stride = 0; },
          "stride=0: expected offset >= 0 and stride >= 1");
  refused([](AttentionBlock& b) { b.key_positions.offset = -1; }, "offset=-1");
  refused([](AttentionBlock& b) { b.k.row_stride = 7; }, "attention.k.row_stride=7: expected at least 8");
  refused([](AttentionBlock& b) { b.k.row_stride = int64_t{1} << 31; }, "attention.k.row_stride=2147483648");
  AttentionPartial partial = run.partial();
  partial.lse = partial.lse.Rows(0, 1);
  ExpectRefused(ResetPartial(run.ctx, partial), kInvalid, "attention.lse=f32[1, 1, 4]");
  partial = run.partial();
  ExpectRefused(FinishPartial(run.ctx, partial), kInvalid, "attention.sum");
  partial.sum = run.delta.ref().Rows(0, 1);
  ExpectRefused(FinishPartial(run.ctx, partial), kInvalid, "attention.sum=f32[1, 1, 4]");
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
  refused([](AttentionGradients& g) { g.out.heads = 3; }, "attention.out=f32[2, 1, 3, 4]");
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
