// The attention op on GPU 0 against the f64 op on the CPU, through every kernel. A naive bf16 implementation,
// by whose error the kernels are judged, rounds the weights and their gradients before their products, and
// results.

#include <numeric>

#include "annulus/device/gpu.h"
#include "gpu/attention_run.h"

namespace annulus::testing {
namespace {

class AttentionOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status used = UseGpu(0);
    ASSERT_TRUE(used.ok()) << used;
  }
};

struct Dims {
  int64_t dim, v_dim;
};
constexpr Dims kTensorCoreDims[] = {{64, 64}, {128, 128}, {192, 128}};

// Operands that T holds exactly, and what they give.
template <typename T>
struct Judge {
  explicit Judge(const AttentionProblem& p) : problem(p) {
    in = {Normal<T>(p.q_elements(), "q"), Normal<T>(p.k_elements(), "k"), Normal<T>(p.v_elements(), "v"),
          Normal<T>(p.out_elements(), "dout")};
    AttentionRun<double> run(p, in);
    run.Forward();
    run.Backward();
    wide = run.Results();
    naive = ReferenceAttention<float>(p, CastAll<float>(in), [](float x) {
      return static_cast<float>(ToDouble(FromDouble<T>(static_cast<double>(x))));
    });
  }

  void Expect(const AttentionResults<double>& got) const {
    // A weight is the exponential of a difference of scores, which are off by epsilon times themselves; naive
    // arithmetic subtracts the largest from itself, so that with one key it is exact.
    double score = 1;
    for (const double lse : wide.lse) score = std::isfinite(lse) ? std::max(score, std::abs(lse)) : score;
    const double dout = MaxAbs(in.dout) * std::max(MaxAbs(in.v), 1.0);
    const auto expect = [](const char* name, const std::vector<double>& values, const std::vector<float>& n,
                           const std::vector<double>& w, double norm) {
      SCOPED_TRACE(name);
      ExpectWithinRule(values, Cast<double>(n), w, norm);
    };
    expect("out", got.out, naive.out, wide.out, MaxAbs(in.v) * score);
    expect("lse", got.lse, naive.lse, wide.lse, 0);
    expect("dq", got.dq, naive.dq, wide.dq, dout);
    expect("dk", got.dk, naive.dk, wide.dk, dout);
    expect("dv", got.dv, naive.dv, wide.dv, dout);
  }

  AttentionProblem problem;
  Operands<double> in;
  AttentionResults<double> wide;
  AttentionResults<float> naive;
};

// With the bounds that `mask_shape` says.
AttentionProblem ProblemOf(const AttentionShape& shape, MaskShape mask_shape) {
  AttentionProblem problem = MakeProblem(shape, MaskKind::kFull);
  for (size_t token = 0; token < problem.hi.size() && mask_shape == MaskShape::kCausal; ++token) {
    problem.hi[token] = static_cast<int64_t>(token) / shape.batch + 1;
  }
  return problem;
}

AttentionShape ShapeOf(const Dims& dims, int64_t q_rows, int64_t k_rows) {
  return {.q_rows = q_rows,
          .k_rows = k_rows,
          .batch = 2,
          .heads = 4,
          .kv_heads = 2,
          .dim = dims.dim,
          .v_dim = dims.v_dim};
}

template <typename T>
absl::string_view KernelOf(const AttentionProblem& p, typename GpuAttention<T>::Options options, Pass pass) {
  return Name(ChooseAttentionKernel({.device = DeviceKind::kCuda,
                                     .hopper = RunsHopperKernels(kGpu),
                                     .dtype = DTypeOf<T>(),
                                     .dim = p.shape.dim,
                                     .v_dim = p.shape.v_dim,
                                     .mask_shape = options.mask_shape,
                                     .pass = pass,
                                     .determinism = options.determinism,
                                     .asked = options.attention}));
}

// Kernels for bf16 that this GPU and this program have: for every mask, and for full and causal blocks.
std::vector<AttentionChoice> OwnKernels() {
  if (!RunsHopperKernels(kGpu)) return {AttentionChoice::kTensorCore};
  return {AttentionChoice::kTensorCore, AttentionChoice::kHopper};
}
std::vector<AttentionChoice> AllKernels() {
  std::vector<AttentionChoice> all = OwnKernels();
  if (ANNULUS_HAS_CUDNN) all.push_back(AttentionChoice::kCudnn);
  return all;
}
absl::string_view NameOf(AttentionChoice kernel) {
  return kernel == AttentionChoice::kHopper  ? "hopper"
         : kernel == AttentionChoice::kCudnn ? "cudnn"
                                             : "cuda mma";
}

// One call, with a carry and without, and chunks in several orders, by the kernel of that name.
template <typename T>
void ExpectEveryWay(const Judge<T>& judge, typename GpuAttention<T>::Options options,
                    absl::string_view kernel) {
  for (const Pass pass : {Pass::kForward, Pass::kBackward})
    ASSERT_EQ(KernelOf<T>(judge.problem, options, pass), kernel);
  GpuAttention<T> run(judge.problem, judge.in, options);
  {
    SCOPED_TRACE("whole");
    judge.Expect(run.Whole());
  }
  std::vector<std::vector<int64_t>> orders = {{0}};
  // A chunk of the keys of a causal block is not itself causal.
  if (options.mask_shape != MaskShape::kCausal) {
    orders.insert(orders.end(), {{0, 1, 2, 3}, {3, 1, 2, 0}, {2, 3, 0, 1}});
  }
  for (const std::vector<int64_t>& order : orders) {
    SCOPED_TRACE(absl::StrCat("chunks ", order.size(), ", first ", order[0]));
    judge.Expect(run.Carried(run.Chunks(order)));
  }
}

TEST_F(AttentionOnGpu, OwnKernelsMatchTheReference) {
  for (const Dims& dims : kTensorCoreDims) {
    for (const MaskKind mask : kAllMasks) {
      const Judge<BFloat16> judge(MakeProblem(ShapeOf(dims, 150, 210), mask, {37, 4}));
      for (const AttentionChoice kernel : OwnKernels()) {
        SCOPED_TRACE(absl::StrCat(NameOf(kernel), " heads of ", dims.dim, " mask ", static_cast<int>(mask)));
        ExpectEveryWay(judge, {.attention = kernel}, NameOf(kernel));
        ExpectEveryWay(
            judge,
            {.determinism = Determinism::kRequired, .order = BatchOrder::kOutsideRows, .attention = kernel},
            NameOf(kernel));
      }
    }
  }
}

// Where nothing is asked for: the kernel for Hopper where it runs.
TEST_F(AttentionOnGpu, TheFastestIsChosen) {
  const AttentionProblem problem = MakeProblem(ShapeOf({128, 128}, 150, 210), MaskKind::kFull);
  const absl::string_view own = RunsHopperKernels(kGpu) ? "hopper" : "cuda mma";
  EXPECT_EQ(KernelOf<BFloat16>(problem, {}, Pass::kForward), own);
  EXPECT_EQ(KernelOf<BFloat16>(problem, {.determinism = Determinism::kRequired}, Pass::kBackward), own);
  const Judge<BFloat16> judge(problem);
  GpuAttention<BFloat16> run(problem, judge.in, {});
  judge.Expect(run.Whole());
}

TEST_F(AttentionOnGpu, F32KernelMatchesTheReference) {
  for (const Dims& dims : {Dims{64, 64}, Dims{192, 128}, Dims{40, 24}}) {
    for (const MaskKind mask : kAllMasks) {
      SCOPED_TRACE(absl::StrCat("heads of ", dims.dim, " mask ", static_cast<int>(mask)));
      const Judge<float> judge(MakeProblem(ShapeOf(dims, 70, 150), mask, {37, 4}));
      ExpectEveryWay(judge, {.order = BatchOrder::kOutsideRows}, "cuda f32");
    }
  }
}

TEST_F(AttentionOnGpu, FullAndCausalBlocksMatchTheReference) {
  for (const Dims& dims : kTensorCoreDims) {
    const Judge<BFloat16> full(ProblemOf(ShapeOf(dims, 150, 210), MaskShape::kFull)),
        causal(ProblemOf(ShapeOf(dims, 200, 200), MaskShape::kCausal));
    for (const AttentionChoice kernel : AllKernels()) {
      SCOPED_TRACE(absl::StrCat(NameOf(kernel), " heads of ", dims.dim));
      for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
        ExpectEveryWay(full, {.mask_shape = MaskShape::kFull, .order = order, .attention = kernel},
                       NameOf(kernel));
        ExpectEveryWay(causal, {.mask_shape = MaskShape::kCausal, .order = order, .attention = kernel},
                       NameOf(kernel));
      }
    }
  }
}

// Sizes around the tiles' edges, one row among them, and one KV head for all heads or for each.
TEST_F(AttentionOnGpu, SizesAroundTiles) {
  for (const Dims& dims : kTensorCoreDims) {
    for (const auto& [q_rows, k_rows] : {std::pair<int64_t, int64_t>{1, 1},
                                         {1, 70},
                                         {2, 1},
                                         {2, 2},
                                         {63, 63},
                                         {64, 65},
                                         {127, 33},
                                         {128, 128},
                                         {129, 129}}) {
      AttentionShape shape = ShapeOf(dims, q_rows, k_rows);
      shape.kv_heads = q_rows % 2 == 0 ? 1 : 4;
      for (const MaskShape mask_shape : {MaskShape::kGeneral, MaskShape::kFull, MaskShape::kCausal}) {
        if (mask_shape == MaskShape::kCausal && q_rows != k_rows) continue;
        SCOPED_TRACE(absl::StrCat("heads of ", dims.dim, ", ", q_rows, " x ", k_rows, " mask shape ",
                                  static_cast<int>(mask_shape)));
        const Judge<BFloat16> judge(ProblemOf(shape, mask_shape));
        for (const AttentionChoice kernel : mask_shape == MaskShape::kGeneral ? OwnKernels() : AllKernels()) {
          SCOPED_TRACE(NameOf(kernel));
          GpuAttention<BFloat16> run(judge.problem, judge.in,
                                     {.mask_shape = mask_shape, .attention = kernel});
          judge.Expect(run.Whole());
          judge.Expect(run.Carried({run.All()}));
        }
      }
    }
  }
}

std::vector<std::pair<AttentionChoice, int64_t>> KernelsAndChunks(std::initializer_list<int64_t> chunks) {
  std::vector<std::pair<AttentionChoice, int64_t>> all;
  for (const AttentionChoice kernel : AllKernels()) {
    for (const int64_t n : chunks) all.emplace_back(kernel, n);
  }
  return all;
}

// The blocks of a causal ring: full ones under the diagonal, causal ones on it.
TEST_F(AttentionOnGpu, CausalRing) {
  constexpr int64_t kRows = 512;
  for (const Dims& dims : kTensorCoreDims) {
    const Judge<BFloat16> judge(ProblemOf(ShapeOf(dims, kRows, kRows), MaskShape::kCausal));
    for (const auto& [kernel, chunks] : KernelsAndChunks({2, 8})) {
      SCOPED_TRACE(absl::StrCat(NameOf(kernel), " heads of ", dims.dim, " chunks ", chunks));
      GpuAttention<BFloat16> run(judge.problem, judge.in, {.attention = kernel});
      const int64_t n = kRows / chunks;
      std::vector<Piece> pieces;
      for (int64_t a = 0; a < chunks; ++a) {
        for (int64_t step = 0; step < chunks; ++step) {
          const int64_t b = (a - step + chunks) % chunks;
          if (b > a) continue;
          pieces.push_back(
              {a * n, (a + 1) * n, b * n, (b + 1) * n, a == b ? MaskShape::kCausal : MaskShape::kFull});
        }
      }
      judge.Expect(run.Carried(pieces));
    }
  }
}

TEST_F(AttentionOnGpu, ErrorDoesNotGrowWithTheNumberOfChunks) {
  const AttentionShape shape{
      .q_rows = 64, .k_rows = 4096, .heads = 2, .kv_heads = 1, .dim = 128, .v_dim = 128};
  const Judge<BFloat16> judge(ProblemOf(shape, MaskShape::kFull));
  for (const auto& [kernel, chunks] : KernelsAndChunks({2, 8, 64})) {
    SCOPED_TRACE(absl::StrCat(NameOf(kernel), " chunks ", chunks));
    GpuAttention<BFloat16> run(judge.problem, judge.in,
                               {.mask_shape = MaskShape::kFull, .attention = kernel});
    std::vector<int64_t> order(static_cast<size_t>(chunks));
    std::iota(order.begin(), order.end(), 0);
    const AttentionResults<double> got = run.Carried(run.Chunks(order));
    judge.Expect(got);
    EXPECT_LE(MaxDifference(got.out, judge.wide.out), MaxDifference(judge.naive.out, judge.wide.out));
  }
}

void ExpectBitsRepeat(AttentionChoice kernel) {
  for (const Dims& dims : kTensorCoreDims) {
    SCOPED_TRACE(absl::StrCat(NameOf(kernel), " heads of ", dims.dim));
    const Judge<BFloat16> judge(ProblemOf(ShapeOf(dims, 500, 500), MaskShape::kCausal));
    const GpuAttention<BFloat16>::Options options = {
        .mask_shape = MaskShape::kCausal, .determinism = Determinism::kRequired, .attention = kernel};
    GpuAttention<BFloat16> a(judge.problem, judge.in, options), b(judge.problem, judge.in, options);
    const auto same = [](const AttentionResults<double>& x, const AttentionResults<double>& y) {
      return SameBits(x.out, y.out) && SameBits(x.lse, y.lse) && SameBits(x.dq, y.dq) &&
             SameBits(x.dk, y.dk) && SameBits(x.dv, y.dv);
    };
    EXPECT_TRUE(same(a.Whole(), b.Whole()));
    EXPECT_TRUE(same(a.Carried({a.All()}), b.Carried({b.All()})));
    // The whole block is the carried one, rounded.
    AttentionResults<double> whole = a.Whole(), carried = b.Carried({b.All()});
    EXPECT_TRUE(SameBits(whole.out, Rounded<BFloat16>(carried.out)));
    EXPECT_TRUE(SameBits(whole.lse, carried.lse));
  }
}

TEST_F(AttentionOnGpu, RequiredDeterminismRepeatsBitForBit) {
  for (const AttentionChoice kernel : OwnKernels()) ExpectBitsRepeat(kernel);
}

// Bit patterns that any arithmetic would change.
std::vector<float> OddValues(size_t n) {
  const float values[] = {-0.0f, std::numeric_limits<float>::denorm_min(), NAN, 0.1f};
  std::vector<float> odd(n);
  for (size_t i = 0; i < n; ++i) odd[i] = values[i % 4];
  return odd;
}

template <typename T>
void ExpectMaskedBlockLeavesEveryBit(AttentionChoice kernel) {
  AttentionProblem problem = MakeProblem(ShapeOf({64, 64}, 130, 130), MaskKind::kFull);
  for (size_t i = 0; i < problem.lo.size(); ++i) {
    problem.lo[i] = i % 2 == 0 ? 130 : 7;  // after the block, or an empty range inside it
    problem.hi[i] = i % 2 == 0 ? 500 : 7;
  }
  const Judge<T> judge(problem);
  GpuAttention<T> run(problem, judge.in, {.attention = kernel});
  const auto out = OddValues(static_cast<size_t>(problem.out_elements()));
  const auto lse = OddValues(static_cast<size_t>(problem.stats()));
  run.out_sum.Set(Cast<double>(out));
  run.lse.Write(lse);
  ANNULUS_CHECK_OK(AttentionForward(run.ctx, run.Block(run.All()), run.Partial(run.All())));
  EXPECT_TRUE(SameBits(Cast<float>(run.out_sum.values()), out));
  EXPECT_TRUE(SameBits(run.lse.template Read<float>(), lse));
}

TEST_F(AttentionOnGpu, FullyMaskedBlockLeavesEveryBit) {
  ExpectMaskedBlockLeavesEveryBit<float>(AttentionChoice::kFastest);
  for (const AttentionChoice kernel : OwnKernels()) ExpectMaskedBlockLeavesEveryBit<BFloat16>(kernel);
}

// Blocks without pairs: nothing is carried, and whole ones give what no keys give.
TEST_F(AttentionOnGpu, EmptyBlocks) {
  for (const auto& [q_rows, k_rows] : {std::pair<int64_t, int64_t>{0, 70}, {70, 0}, {0, 0}}) {
    SCOPED_TRACE(absl::StrCat(q_rows, " x ", k_rows));
    for (const MaskShape mask_shape : {MaskShape::kGeneral, MaskShape::kFull}) {
      const Judge<BFloat16> judge(ProblemOf(ShapeOf({128, 128}, q_rows, k_rows), mask_shape));
      for (const AttentionChoice kernel : mask_shape == MaskShape::kGeneral ? OwnKernels() : AllKernels()) {
        GpuAttention<BFloat16> run(judge.problem, judge.in, {.mask_shape = mask_shape, .attention = kernel});
        judge.Expect(run.Whole());
        judge.Expect(run.Carried({run.All()}));
      }
    }
  }
}

TEST_F(AttentionOnGpu, WhatTheKernelsLackIsRefusedByName) {
  const AttentionProblem problem = MakeProblem(ShapeOf({128, 128}, 20, 20), MaskKind::kFull);
  const Judge<BFloat16> judge(problem);
  GpuAttention<BFloat16> run(problem, judge.in, {});
  const auto refused = [&](const auto& change, absl::string_view text) {
    AttentionBlock block = run.Block(run.All());
    AttentionPartial partial = run.Partial(run.All());
    change(block, partial);
    ExpectRefused(AttentionForward(run.ctx, block, partial), absl::StatusCode::kInvalidArgument, text);
  };
  refused([](AttentionBlock& b, AttentionPartial&) { b.q.dim = b.k.dim = 96; },
          "attention: heads of 96 with values of 128 in bf16 on a GPU: expected 64 with 64, 128 with 128, or "
          "192 with 128");
  refused([](AttentionBlock& b, AttentionPartial&) { b.q.row_stride += 4; },
          "attention.q: address 0 past a multiple of 16 bytes");
  refused([](AttentionBlock& b, AttentionPartial&) { b.k.data = static_cast<const char*>(b.k.data) + 2; },
          "attention.k: address 2 past");
  refused([](AttentionBlock&, AttentionPartial& p) { p.out.data = static_cast<char*>(p.out.data) + 4; },
          "attention.out: address 4 past");
  refused([](AttentionBlock& b, AttentionPartial&) { b.scale = 0; }, "attention.scale=0: expected above 0");
  refused([](AttentionBlock& b, AttentionPartial&) { b.q.dtype = b.k.dtype = b.v.dtype = DType::kF64; },
          "attention.q.dtype=f64: expected f32 or bf16");
  refused([](AttentionBlock& b, AttentionPartial&) { b.bounds.lo = ConstTensorRef(); },
          "attention.bounds.lo=");
}

}  // namespace
}  // namespace annulus::testing
