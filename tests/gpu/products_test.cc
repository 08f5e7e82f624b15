// Matrix products and the chunked loss on GPU 0 through the public API. Fails where there is none.

#include <cuda_runtime_api.h>

#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/linear.h"
#include "gpu/gpu_harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

using reference::At;

template <typename T>
class GpuProducts : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuProducts, GpuTypes);

struct LinearShape {
  int64_t tokens, in, out, pad;  // elements between rows
};

// [rows, cols] of `cols + pad` elements a row: NaN, which the op must overwrite, and between the rows what it
// must keep.
std::vector<double> Overwritten(int64_t rows, int64_t cols, int64_t pad) {
  std::vector<double> values;
  for (int64_t i = 0; i < rows * (cols + pad); ++i) values.push_back(i % (cols + pad) < cols ? NAN : 7);
  return values;
}

enum LinearOutput : size_t { kY, kYSum, kDx, kDxSum, kDw };

// Outputs in this order, with what lies between the rows.
template <typename T>
auto LinearOps(const LinearShape& s) {
  const int64_t si = s.in + s.pad, so = s.out + s.pad;
  return [=, x0 = Normal<T>(s.tokens * si, "x"), w0 = Normal<T>(s.out * si, "w"),
          dy0 = Normal<T>(s.tokens * so, "dy"), y0 = Normal<T>(s.tokens * so, "y"),
          dx0 = Normal<T>(s.tokens * si, "dx"), dw0 = Normal<float>(s.out * si, "dw")](auto& run) -> Outputs {
    const TensorRef x = run.In({s.tokens, si}, x0), w = run.In({s.out, si}, w0),
                    dy = run.In({s.tokens, so}, dy0),
                    y = run.In({s.tokens, so}, Overwritten(s.tokens, s.out, s.pad)),
                    y_sum = run.In({s.tokens, so}, y0),
                    dx = run.In({s.tokens, si}, Overwritten(s.tokens, s.in, s.pad)),
                    dx_sum = run.In({s.tokens, si}, dx0), dw = run.InAccum({s.out, si}, dw0);
    const auto part = [](const TensorRef& t, int64_t cols) {
      return MatrixRef{t.raw(), t.dtype(), t.dim(0), cols, t.dim(1)};
    };
    const MatrixRef xm = part(x, s.in), wm = part(w, s.in), dym = part(dy, s.out);
    ANNULUS_CHECK_OK(LinearForward(run.ctx, xm, wm, Write::kOverwrite, part(y, s.out)));
    ANNULUS_CHECK_OK(LinearForward(run.ctx, xm, wm, Write::kAccumulate, part(y_sum, s.out)));
    ANNULUS_CHECK_OK(LinearBackwardInput(run.ctx, dym, wm, Write::kOverwrite, part(dx, s.in)));
    ANNULUS_CHECK_OK(LinearBackwardInput(run.ctx, dym, wm, Write::kAccumulate, part(dx_sum, s.in)));
    ANNULUS_CHECK_OK(LinearBackwardWeight(run.ctx, dym, xm, part(dw, s.in)));
    return {run.Rounded(y), run.Rounded(y_sum), run.Rounded(dx), run.Rounded(dx_sum), run.Summed(dw)};
  };
}

// A dense part of the first `cols` of each row.
std::vector<float> Part(const std::vector<double>& values, int64_t cols, int64_t stride) {
  std::vector<float> part;
  for (size_t i = 0; i < values.size(); ++i) {
    if (static_cast<int64_t>(i) % stride < cols) part.push_back(static_cast<float>(values[i]));
  }
  return part;
}
void SetPart(const std::vector<float>& part, int64_t cols, int64_t stride, std::vector<double>* values) {
  size_t next = 0;
  for (size_t i = 0; i < values->size(); ++i) {
    if (static_cast<int64_t>(i) % stride < cols) (*values)[i] = part[next++];
  }
}

// Sums in f32 by plain loops. In bf16 a product is rounded before it is added to what is there.
template <typename T>
Outputs NaiveLinear(const LinearShape& s) {
  const int64_t si = s.in + s.pad, so = s.out + s.pad;
  Outputs naive = NaiveOf<T>(LinearOps<T>(s));
  const auto x = Part(Normal<T>(s.tokens * si, "x"), s.in, si),
             w = Part(Normal<T>(s.out * si, "w"), s.in, si),
             dy = Part(Normal<T>(s.tokens * so, "dy"), s.out, so);
  const auto at = [](const std::vector<float>& m, int64_t cols) {
    return [&m, cols](int64_t i, int64_t j) { return m[At(i, j, cols)]; };
  };
  const auto transposed = [](const std::vector<float>& m, int64_t cols) {
    return [&m, cols](int64_t i, int64_t j) { return m[At(j, i, cols)]; };
  };
  const auto rounded = [](std::vector<float> values) {
    for (float& value : values) value = static_cast<float>(ToDouble(FromDouble<T>(value)));
    return values;
  };
  const auto set = [&](LinearOutput product, LinearOutput sum, std::vector<float> values, int64_t cols,
                       std::vector<float> before) {
    values = rounded(values);
    for (size_t i = 0; i < values.size(); ++i) before[i] += values[i];
    SetPart(values, cols, cols + s.pad, &naive[product].values);
    SetPart(rounded(before), cols, cols + s.pad, &naive[sum].values);
  };
  using Floats = std::vector<float>;
  set(kY, kYSum,
      reference::Gemm<float>({s.tokens, s.out, s.in}, at(x, s.in), transposed(w, s.in),
                             Floats(static_cast<size_t>(s.tokens * s.out))),
      s.out, Part(Normal<T>(s.tokens * so, "y"), s.out, so));
  set(kDx, kDxSum,
      reference::Gemm<float>({s.tokens, s.in, s.out}, at(dy, s.out), at(w, s.in),
                             Floats(static_cast<size_t>(s.tokens * s.in))),
      s.in, Part(Normal<T>(s.tokens * si, "dx"), s.in, si));
  SetPart(reference::Gemm<float>({s.out, s.in, s.tokens}, transposed(dy, s.out), at(x, s.in),
                                 Part(Normal<float>(s.out * si, "dw"), s.in, si)),
          s.in, si, &naive[kDw].values);
  return naive;
}

TYPED_TEST(GpuProducts, LinearEdges) {
  for (const LinearShape& s :
       {LinearShape{0, 8, 8, 0}, LinearShape{8, 0, 8, 1}, LinearShape{8, 8, 0, 1}, LinearShape{1, 1, 1, 0},
        LinearShape{1, 8, 8, 0}, LinearShape{33, 72, 40, 3}, LinearShape{130, 7, 5, 1},
        LinearShape{64, 128, 96, 8}, LinearShape{129, 65, 127, 0}}) {
    SCOPED_TRACE(absl::StrCat(s.tokens, " ", s.in, " ", s.out));
    ExpectOnGpu<TypeParam>(LinearOps<TypeParam>(s), NaiveLinear<TypeParam>(s));
  }
}

TYPED_TEST(GpuProducts, LinearAtSize) {
  const LinearShape s{515, 1024, 384, 64};
  ExpectOnGpu<TypeParam>(LinearOps<TypeParam>(s), NaiveLinear<TypeParam>(s));
  ExpectSameBitsTwice<TypeParam>(LinearOps<TypeParam>(s));
}

struct LossShape {
  int64_t tokens, d, vocab, chunk;
};

// Every fourth token is not counted.
std::vector<int32_t> Targets(const LossShape& s) {
  const RandomStream random(7, "targets");
  std::vector<int32_t> targets;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const auto draw = random.Below(static_cast<uint64_t>(t), static_cast<uint64_t>(s.vocab));
    targets.push_back(t % 4 == 3 ? -100 : static_cast<int32_t>(draw));
  }
  return targets;
}

constexpr double kLossScale = 0.125;

template <typename T>
struct LossProblem {
  explicit LossProblem(const LossShape& s)
      : shape(s),
        x(Normal<T>(s.tokens * s.d, "x")),
        w(Normal<T>(s.vocab * s.d, "w", 0.3)),
        dw(Normal<float>(s.vocab * s.d, "dw", 0.1)),
        targets(Targets(s)) {}

  // dx, dw, the loss with gradients and the loss alone
  Outputs operator()(auto& run) const {
    const LossShape& s = shape;
    const TensorRef xs = run.In({s.tokens, s.d}, x), ws = run.In({s.vocab, s.d}, w),
                    ids = run.Of({s.tokens}, targets), dxs = run.Out({s.tokens, s.d}),
                    dws = run.InAccum({s.vocab, s.d}, dw), loss = run.Scalar(0.5), alone = run.Scalar(0.5);
    const LinearCrossEntropy args{.x = xs, .w = ws, .targets = ids, .chunk_tokens = s.chunk};
    ANNULUS_CHECK_OK(
        LinearCrossEntropyForwardBackward(run.ctx, args, {.scale = kLossScale, .dx = dxs, .dw = dws}, loss));
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, args, alone));
    const double norm = 20 * static_cast<double>(s.tokens);  // logits are of this order
    return {run.Rounded(dxs), run.Summed(dws, MaxAbs(x)), run.SummedInDouble(loss, norm),
            run.SummedInDouble(alone, norm)};
  }

  LossShape shape;
  std::vector<double> x, w, dw;
  std::vector<int32_t> targets;
};

// In bf16 the gradient of the logits is rounded before the products with it.
Outputs NaiveLoss(const LossProblem<BFloat16>& p) {
  const LossShape& s = p.shape;
  Outputs naive = NaiveOf<BFloat16>(p);
  std::vector<double> dx(p.x.size()), dw = p.dw;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const int32_t target = p.targets[static_cast<size_t>(t)];
    if (target < 0) continue;
    const auto probability = reference::SoftmaxAndLogSum(p.x, p.w, {s.tokens, s.d, s.vocab}, t);
    for (int64_t v = 0; v < s.vocab; ++v) {
      const double exact = kLossScale * (probability[static_cast<size_t>(v)] - (v == target ? 1 : 0));
      const double dlogit = ToDouble(FromDouble<BFloat16>(exact));
      for (int64_t i = 0; i < s.d; ++i) {
        dx[At(t, i, s.d)] += dlogit * p.w[At(v, i, s.d)];
        dw[At(v, i, s.d)] += dlogit * p.x[At(t, i, s.d)];
      }
    }
  }
  naive[0].values = Rounded<BFloat16>(dx);
  naive[1].values = Rounded<float>(dw);
  return naive;
}
Outputs NaiveLoss(const LossProblem<float>& p) { return NaiveOf<float>(p); }

template <typename T>
void ExpectLoss(const LossShape& s) {
  SCOPED_TRACE(absl::StrCat(s.tokens, " ", s.d, " ", s.vocab));
  const LossProblem<T> problem(s);
  ExpectOnGpu<T>(problem, NaiveLoss(problem));
}

TYPED_TEST(GpuProducts, LossEdges) {
  for (const LossShape& s :
       {LossShape{0, 8, 5, 8}, LossShape{1, 8, 1, 8}, LossShape{5, 0, 7, 8}, LossShape{7, 3, 17, 8},
        LossShape{9, 8, 64, 1}, LossShape{33, 24, 517, 8}, LossShape{4, 8, 1023, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
}

// One, two, four, eight and nine CTAs a row.
TYPED_TEST(GpuProducts, LossOfCtasEdges) {
  for (const LossShape& s : {LossShape{3, 8, 27648, 8}, LossShape{3, 8, 27649, 8}, LossShape{3, 8, 55297, 8},
                             LossShape{3, 8, 110593, 8}, LossShape{3, 8, 221185, 8}}) {
    ExpectLoss<TypeParam>(s);
  }
}

// Up to the largest vocabulary.
TYPED_TEST(GpuProducts, LossAtSize) {
  for (const LossShape& s :
       {LossShape{100, 64, 1000, 32}, LossShape{9, 16, 18435, 8192}, LossShape{6, 8, 32000, 4},
        LossShape{6, 8, 50257, 8192}, LossShape{5, 8, 128256, 8192}, LossShape{3, 8, 458752, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
  ExpectSameBitsTwice<TypeParam>(LossProblem<TypeParam>({100, 64, 50257, 32}));
}

// Each cluster takes several: the next row comes while one is worked on.
TYPED_TEST(GpuProducts, LossOfMoreRowsThanTheDeviceHolds) {
  for (const LossShape& s : {LossShape{1501, 8, 1003, 8192}, LossShape{301, 8, 56325, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
}

// exp of these logits overflows; one token is all but certain, the other hopeless.
TYPED_TEST(GpuProducts, LargeLogitsDoNotOverflow) {
  OpRun<TypeParam> run(kGpu);
  const TensorRef x = run.In({2, 1}, {1, 1}), w = run.In({3, 1}, {4096, -2048, 0}), dx = run.Out({2, 1}),
                  dw = run.InAccum({3, 1}, {0, 0, 0}), loss = run.Scalar(0),
                  targets = run.Of({2}, std::vector<int32_t>{0, 1});
  ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(run.ctx, {.x = x, .w = w, .targets = targets},
                                                     {.dx = dx, .dw = dw}, loss));
  EXPECT_EQ(run.template Read<double>(loss)[0], 6144);
  EXPECT_EQ(run.Rounded(dx).values, (std::vector<double>{0, 6144}));
  EXPECT_EQ(run.Summed(dw).values, (std::vector<double>{1, -1, 0}));
}

// NaN must reach the loss, where the step is given up.
TYPED_TEST(GpuProducts, NanReachesTheLoss) {
  for (const double bad : {static_cast<double>(NAN), HUGE_VAL}) {
    OpRun<TypeParam> run(kGpu);
    const TensorRef x = run.In({2, 1}, {1, bad}), w = run.In({300, 1}, Normal<TypeParam>(300, "w")),
                    loss = run.Scalar(0), targets = run.Of({2}, std::vector<int32_t>{0, 1});
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, {.x = x, .w = w, .targets = targets}, loss));
    EXPECT_FALSE(std::isfinite(run.template Read<double>(loss)[0]));
  }
}

// What a plan of memory counts on is exactly what a call takes.
TYPED_TEST(GpuProducts, LossScratchIsWhatItIsSaidToBe) {
  for (const auto& [tokens, vocab] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {8200, 70}, {100, 50257}}) {
    OpRun<TypeParam> run(kGpu);
    const TensorRef x = run.In({tokens, 8}, Normal<TypeParam>(tokens * 8, "x")),
                    w = run.In({vocab, 8}, Normal<TypeParam>(vocab * 8, "w")), loss = run.Scalar(0),
                    targets = run.Of({tokens}, std::vector<int32_t>(static_cast<size_t>(tokens)));
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, {.x = x, .w = w, .targets = targets}, loss));
    EXPECT_EQ(run.ctx.scratch.high_water_bytes(),
              LinearCrossEntropyScratchBytes(DeviceKind::kCuda, DTypeOf<TypeParam>(), tokens, vocab));
  }
}

// Whatever allocates, waits or uses another stream fails while a stream is captured.
TYPED_TEST(GpuProducts, OnlyEnqueueOnTheirStream) {
  OpRun<TypeParam> run(kGpu);
  const int64_t n = 64;
  const auto values = Normal<TypeParam>(n * n, "x");
  const TensorRef x = run.In({n, n}, values), w = run.In({n, n}, values), y = run.Out({n, n}),
                  dw = run.InAccum({n, n}, values), loss = run.Scalar(0),
                  targets = run.Of({n}, std::vector<int32_t>(static_cast<size_t>(n)));
  const auto all = [&] {
    for (const absl::Status& status :
         {LinearForward(run.ctx, x, w, Write::kOverwrite, y), LinearBackwardWeight(run.ctx, y, x, dw),
          LinearBackwardInput(run.ctx, x, w, Write::kAccumulate, y),
          LinearCrossEntropyForwardBackward(run.ctx, {.x = x, .w = w, .targets = targets},
                                            {.dx = y, .dw = dw}, loss)}) {
      EXPECT_TRUE(status.ok()) << status;
    }
  };
  all();  // plans are made and scratch memory grows once
  ASSERT_EQ(cudaStreamBeginCapture(run.ctx.stream(), cudaStreamCaptureModeGlobal), cudaSuccess);
  all();
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(run.ctx.stream(), &graph), cudaSuccess);
  cudaGraphDestroy(graph);
}

TEST(GpuProductArguments, AreRefusedByName) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  OpRun<BFloat16> run(kGpu);
  const TensorRef x = run.Out({2, 4}), w = run.Out({3, 4}), y = run.Out({2, 3}), loss = run.Scalar(0),
                  targets = run.Of({2}, std::vector<int32_t>(2));
  ExpectRefused(LinearBackwardWeight(run.ctx, y, x, w), kInvalid, "linear.dw=bf16[3, 4]: expected f32[3, 4]");
  ExpectRefused(LinearCrossEntropyForwardBackward(run.ctx, {.x = x, .w = w, .targets = targets},
                                                  {.dx = x, .dw = w}, loss),
                kInvalid, "cross_entropy.dw=bf16[3, 4] on cuda:0: expected f32[3, 4] on cuda:0");
  const TensorRef thin = run.Out({2, 1}), tall = run.Out({458753, 1});
  ExpectRefused(LinearCrossEntropyForward(run.ctx, {.x = thin, .w = tall, .targets = targets}, loss),
                kInvalid, "cross_entropy: vocab=458753: expected at most 458752 on GPUs");
}

}  // namespace
}  // namespace annulus::testing
