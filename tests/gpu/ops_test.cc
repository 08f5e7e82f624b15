// Every op but attention, products and the loss, on GPU 0 through the public API. Fails where there is none.
//   *Edges: small shapes, around what one thread, warp or CTA takes   *AtSize: larger ones

#include <cuda_runtime_api.h>
#include <gtest/gtest-spi.h>

#include "annulus/ops/adamw.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/embedding.h"
#include "annulus/ops/relu_squared.h"
#include "annulus/ops/rms_norm.h"
#include "annulus/ops/rope.h"
#include "annulus/ops/swiglu.h"
#include "gpu/gpu_harness.h"

namespace annulus::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = HUGE_VAL;
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

// The rule and the guards notice what they are there for.
TEST(GpuHarness, NoticesErrorsAndStrayWrites) {
  const std::vector<double> wide = {1, 2, 3}, off = {1, 2, 3.00001}, nan = {1, kNan, 3};
  ExpectWithinRule(wide, wide, wide, 0);
  EXPECT_NONFATAL_FAILURE(ExpectWithinRule(off, wide, wide, 0), "MaxDifference");
  EXPECT_NONFATAL_FAILURE(EXPECT_TRUE(SameBits(wide, nan)), "SameBits");
  OpRun<float> run(kGpu, 1);
  const TensorRef x = run.In({2, 3}, {1, 2, 3, 4, 5, 6}), first = x.Rows(0, 1);
  const TensorRef longer(first.raw(), DType::kF32, kGpu, {7});
  EXPECT_EQ(run.Rounded(x).values, (std::vector<double>{1, 2, 3, 4, 5, 6}));
  ANNULUS_CHECK_OK(Zero(run.ctx, longer));
  EXPECT_NONFATAL_FAILURE(run.Rounded(x), "written past the tensor");
}

template <typename T>
class GpuOps : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuOps, GpuTypes);

template <typename T>
auto ElementwiseOps(int64_t n) {
  return [n, a = Normal<T>(n, "a"), b = Normal<T>(n, "b")](auto& run) -> Outputs {
    const TensorRef x = run.In({n}, a), zero = run.Out({n}), copy = run.Out({n}), sum = run.In({n}, b),
                    scaled = run.In({n}, b), squares = run.Scalar(2.5);
    ANNULUS_CHECK_OK(Zero(run.ctx, zero));
    ANNULUS_CHECK_OK(Copy(run.ctx, x, copy));
    ANNULUS_CHECK_OK(AddInPlace(run.ctx, x, sum));
    ANNULUS_CHECK_OK(Scale(run.ctx, 0.37, scaled));
    ANNULUS_CHECK_OK(AddSumOfSquares(run.ctx, x, squares));
    return {run.Rounded(zero), run.Rounded(copy), run.Rounded(sum), run.Rounded(scaled),
            run.SummedInDouble(squares)};
  };
}

TYPED_TEST(GpuOps, ElementwiseEdges) {
  for (const int64_t n : {0, 1, 3, 4, 7, 8, 9, 1023, 1024, 4095, 4096, 4097, 12293}) {
    SCOPED_TRACE(n);
    ExpectOnGpu<TypeParam>(ElementwiseOps<TypeParam>(n));
  }
}

TYPED_TEST(GpuOps, ElementwiseAtSize) {
  const auto ops = ElementwiseOps<TypeParam>(3000001);
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

template <typename From, typename To>
std::vector<To> CastOn(Device device, const std::vector<From>& values, int64_t shift) {
  OpRun<float> run(device, shift);
  const Shape shape{static_cast<int64_t>(values.size())};
  const TensorRef x = run.Of(shape, values), y = run.Of(shape, std::vector<To>(values.size()));
  ANNULUS_CHECK_OK(Cast(run.ctx, x, y));
  return run.template Read<To>(y);
}

template <typename From, typename To>
void ExpectCastAsOnCpu(const std::vector<From>& values) {
  for (const int64_t shift : {0, 1}) {
    const auto got = CastOn<From, To>(kGpu, values, shift), want = CastOn<From, To>(Device{}, values, 0);
    for (size_t i = 0; i < got.size(); ++i) {
      if (std::isnan(ToDouble(want[i]))) {
        EXPECT_TRUE(std::isnan(ToDouble(got[i]))) << "at " << i;
      } else {
        EXPECT_EQ(std::memcmp(&got[i], &want[i], sizeof(To)), 0) << "at " << i << ": " << ToDouble(got[i]);
      }
    }
  }
}

TEST(GpuCast, RoundsAsTheCpuDoes) {
  auto values = NormalValues<float>(1001, "cast");
  for (const float special : {0.0f, -0.0f, 1 + 0x1p-8f, 1 + 0x3p-8f, -1 - 0x1.001p-8f, 0x1p-133f, 0x1.8p-134f,
                              3.4e38f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    values.push_back(special);
  }
  ExpectCastAsOnCpu<float, BFloat16>(values);
  ExpectCastAsOnCpu<float, float>(values);
  ExpectCastAsOnCpu<float, BFloat16>({});
  std::vector<BFloat16> all;
  for (uint32_t bits = 0; bits < 65536; ++bits) all.push_back({static_cast<uint16_t>(bits)});
  ExpectCastAsOnCpu<BFloat16, float>(all);
}

TEST(GpuClipFactor, IsThatOfTheCpu) {
  std::vector<double> many(100, 1.0);
  many[0] = 9;
  auto infinite = many, undefined = many;
  infinite[99] = -kInfinity;
  undefined[37] = kNan;
  const std::vector<std::vector<double>> cases = {{16},   {16, 1e300}, {0},  {1e300},  {kNan},
                                                  {-1.0}, {kInfinity}, many, infinite, undefined};
  for (const auto& stats : cases) {
    for (const double max_norm : {0.0, 1.0, 3.0, 4.0}) {
      SCOPED_TRACE(absl::StrCat(stats[0], ", ", stats.size(), " statistics, at most ", max_norm));
      ExpectOnGpu<float>([&](auto& run) -> Outputs {
        const TensorRef in = run.template Of<double>({static_cast<int64_t>(stats.size())}, stats),
                        factor = run.Scalar(77);
        ANNULUS_CHECK_OK(ClipFactor(run.ctx, in, max_norm, factor));
        return {run.SummedInDouble(factor)};
      });
    }
  }
}

TYPED_TEST(GpuOps, AdamWEdges) {
  using T = TypeParam;
  for (const int64_t n : {0, 1, 3, 4, 5, 1023, 1025, 4099}) {
    SCOPED_TRACE(n);
    const auto p = Normal<float>(n, "p"), g = Normal<float>(n, "g");
    ExpectOnGpu<T>([&](auto& run) -> Outputs {
      const std::vector<double> zeros(p.size());
      const TensorRef param = run.InAccum({n}, p), m = run.InAccum({n}, zeros), v = run.InAccum({n}, zeros),
                      grad = run.InAccum({n}, g), scale = run.Scalar(0.7), copy = run.Out({n});
      for (int64_t step = 1; step <= 3; ++step) {
        const AdamWHyper hyper{.lr = 0.01, .weight_decay = 0.1, .step = step};
        ANNULUS_CHECK_OK(AdamWUpdate(run.ctx, hyper, {param, m, v, grad, scale, copy}));
      }
      const Output rounded = run.Rounded(copy);
      ANNULUS_CHECK_OK(
          AdamWUpdate(run.ctx, {.lr = 0.01, .step = 4}, {param, m, v, grad, scale, TensorRef()}));
      return {run.Summed(param), run.Summed(m), run.Summed(v), rounded};
    });
  }
}

// A step whose loss or norm is not finite leaves no trace, whatever the gradient holds.
TYPED_TEST(GpuOps, AdamWWithANanScaleChangesNoBit) {
  using T = TypeParam;
  for (const int64_t n : {5, 4096}) {
    auto g = Normal<float>(n, "g");
    g[2] = kInfinity, g[3] = kNan;
    OpRun<T> run(kGpu);
    const std::vector<double> p = Normal<float>(n, "p"), c = Normal<T>(n, "c");
    const TensorRef param = run.InAccum({n}, p), m = run.InAccum({n}, p), v = run.InAccum({n}, p),
                    grad = run.InAccum({n}, g), scale = run.Scalar(kNan), copy = run.In({n}, c);
    ANNULUS_CHECK_OK(
        AdamWUpdate(run.ctx, {.lr = 0.5, .weight_decay = 0.1}, {param, m, v, grad, scale, copy}));
    for (const TensorRef& state : {param, m, v}) EXPECT_TRUE(SameBits(run.Summed(state).values, p));
    EXPECT_TRUE(SameBits(run.Rounded(copy).values, c));
  }
}

struct EmbeddingShape {
  int64_t tokens, d, vocab;
};

// A third of the tokens are the same. Every `absent`th, if any, is of another rank.
template <typename T>
auto EmbeddingOps(const EmbeddingShape& s, int64_t absent = 0) {
  const RandomStream random(7, "tokens");
  std::vector<int32_t> tokens;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const auto draw = random.Below(static_cast<uint64_t>(t), static_cast<uint64_t>(s.vocab));
    const bool elsewhere = absent > 0 && t % absent == absent - 1;
    tokens.push_back(elsewhere ? -1 : t % 3 == 0 ? 0 : static_cast<int32_t>(draw));
  }
  return [=, table = Normal<T>(s.vocab * s.d, "table"), dy = Normal<T>(s.tokens * s.d, "dy"),
          before = Normal<float>(s.vocab * s.d, "dtable")](auto& run) -> Outputs {
    const TensorRef ids = run.Of({s.tokens}, tokens), w = run.In({s.vocab, s.d}, table),
                    y = run.Out({s.tokens, s.d}), upstream = run.In({s.tokens, s.d}, dy),
                    dw = run.InAccum({s.vocab, s.d}, before);
    ANNULUS_CHECK_OK(EmbeddingForward(run.ctx, ids, w, y));
    ANNULUS_CHECK_OK(EmbeddingBackward(run.ctx, ids, upstream, dw));
    return {run.Rounded(y), run.Summed(dw)};
  };
}

TYPED_TEST(GpuOps, EmbeddingEdges) {
  for (const EmbeddingShape& s :
       {EmbeddingShape{0, 8, 3}, EmbeddingShape{1, 8, 3}, EmbeddingShape{5, 0, 3}, EmbeddingShape{31, 12, 50},
        EmbeddingShape{64, 512, 1}, EmbeddingShape{65, 7, 1}, EmbeddingShape{129, 264, 9},
        // Runs of 128, the longest that is added at once, of 129, and of many pieces.
        EmbeddingShape{128, 8, 1}, EmbeddingShape{129, 8, 1}, EmbeddingShape{600, 1032, 3},
        // More tokens than the threads that group them, and numbers past the first of each CTA.
        EmbeddingShape{1100, 8, 70000}}) {
    SCOPED_TRACE(absl::StrCat(s.tokens, " ", s.d, " ", s.vocab));
    ExpectOnGpu<TypeParam>(EmbeddingOps<TypeParam>(s));
  }
}

TYPED_TEST(GpuOps, EmbeddingAtSize) {
  for (const EmbeddingShape& s : {EmbeddingShape{5000, 128, 7}, EmbeddingShape{3000, 1032, 3001}}) {
    const auto ops = EmbeddingOps<TypeParam>(s);
    ExpectOnGpu<TypeParam>(ops);
    ExpectSameBitsTwice<TypeParam>(ops);
  }
}

// From all tokens to a few, so that whole pieces of the grouped tokens are missing.
TYPED_TEST(GpuOps, EmbeddingOfAPartOfTheVocabulary) {
  for (const int64_t absent : {1, 2, 5}) {
    for (const EmbeddingShape& s :
         {EmbeddingShape{1, 8, 3}, EmbeddingShape{33, 12, 50}, EmbeddingShape{129, 264, 9},
          EmbeddingShape{600, 1032, 3}, EmbeddingShape{1100, 8, 70000}}) {
      SCOPED_TRACE(absl::StrCat(s.tokens, " ", s.d, " ", s.vocab, " without every ", absent));
      const auto ops = EmbeddingOps<TypeParam>(s, absent);
      ExpectOnGpu<TypeParam>(ops);
      ExpectSameBitsTwice<TypeParam>(ops);
    }
  }
}

template <typename T>
auto RmsNormOps(int64_t tokens, int64_t d) {
  const int64_t n = tokens * d;
  return [=, x = Normal<T>(n, "x", 2), w = Normal<T>(d, "w"), dy = Normal<T>(n, "dy"),
          dx = Normal<T>(n, "dx"), dw = Normal<float>(d, "dw")](auto& run) -> Outputs {
    const TensorRef in = run.In({tokens, d}, x), weight = run.In({d}, w), y = run.Out({tokens, d}),
                    upstream = run.In({tokens, d}, dy), gx = run.In({tokens, d}, dx),
                    gw = run.InAccum({d}, dw);
    ANNULUS_CHECK_OK(RmsNormForward(run.ctx, in, weight, 1e-5, y));
    ANNULUS_CHECK_OK(RmsNormBackward(run.ctx, in, weight, upstream, 1e-5, gx, gw));
    return {run.Rounded(y), run.Rounded(gx), run.Summed(gw)};
  };
}

TYPED_TEST(GpuOps, RmsNormEdges) {
  for (const auto& [tokens, d] : std::vector<std::pair<int64_t, int64_t>>{{0, 64},
                                                                          {3, 0},
                                                                          {1, 1},
                                                                          {1, 8},
                                                                          {3, 12},
                                                                          {37, 100},
                                                                          {301, 128},
                                                                          {70, 512},
                                                                          {9, 1032},
                                                                          {5, 2047}}) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", d));
    ExpectOnGpu<TypeParam>(RmsNormOps<TypeParam>(tokens, d));
  }
}

// More rows than the device holds: CTAs of the backward walk along several.
TYPED_TEST(GpuOps, RmsNormAtSize) {
  for (const auto& [tokens, d] :
       std::vector<std::pair<int64_t, int64_t>>{{700, 1024}, {8001, 136}, {7001, 520}, {3001, 2048}}) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", d));
    const auto ops = RmsNormOps<TypeParam>(tokens, d);
    ExpectOnGpu<TypeParam>(ops);
    ExpectSameBitsTwice<TypeParam>(ops);
  }
}

// Rows of more than 2048 elements go by whole vectors only.
TYPED_TEST(GpuOps, RmsNormOfWideRows) {
  using T = TypeParam;
  for (const auto& [tokens, d] :
       std::vector<std::pair<int64_t, int64_t>>{{1101, 4096}, {33, 5120}, {701, 8192}}) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", d));
    const auto ops = RmsNormOps<T>(tokens, d);
    OpRun<double> in_double(Device{});
    OpRun<T> gpu(kGpu), off(kGpu, 1);
    const Outputs wide = ops(in_double), naive = NaiveOf<T>(ops), got = ops(gpu);
    for (size_t i = 0; i < wide.size(); ++i) {
      ExpectWithinRule(got[i].values, naive[i].values, wide[i].values, 0);
    }
    const TensorRef x = off.Out({2, d}), w = off.Out({d}), dw = off.InAccum({d}, Normal<float>(d, "dw"));
    ExpectRefused(RmsNormBackward(off.ctx, x, w, x, 1e-5, x, dw), kInvalid, "rms_norm.x=");
  }
}

struct RopeShape {
  int64_t rows, batch, first, heads, dim, after;  // columns before and after the heads
};

template <typename T>
auto RopeOps(const RopeShape& s) {
  const int64_t columns = s.first + s.heads * s.dim + s.after;
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < s.rows; ++r) positions.push_back(r < 4 ? r : 1000000 + 77 * r);
  return [=, values = Normal<T>(s.rows * s.batch * columns, "x")](auto& run) -> Outputs {
    const TensorRef rows = run.Of({s.rows}, positions);
    Outputs outputs;
    for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kGradient}) {
      const TensorRef x = run.In({s.rows, s.batch, columns}, values);
      ANNULUS_CHECK_OK(Rope(run.ctx, rows, MakeRopeFrequencies(500000, s.dim), direction,
                            HeadsOf(x, s.first, s.heads, s.dim)));
      outputs.push_back(run.Rounded(x));  // with what lies around the heads
    }
    return outputs;
  };
}

TYPED_TEST(GpuOps, RopeEdges) {
  for (const RopeShape& s :
       {RopeShape{0, 1, 0, 2, 8, 0}, RopeShape{1, 1, 0, 1, 2, 0}, RopeShape{5, 3, 1, 2, 6, 0},
        RopeShape{33, 1, 0, 5, 64, 0}, RopeShape{65, 2, 0, 8, 128, 1024}, RopeShape{17, 1, 8, 3, 256, 8},
        RopeShape{3, 2, 0, 2, 512, 8}, RopeShape{9, 1, 24, 1, 64, 0}, RopeShape{4, 2, 0, 0, 64, 8}}) {
    SCOPED_TRACE(absl::StrCat(s.rows, " ", s.batch, " ", s.heads, " ", s.dim));
    ExpectOnGpu<TypeParam>(RopeOps<TypeParam>(s));
  }
}

// Many CTAs; of the last shape a row is more than a CTA has in flight at once.
TYPED_TEST(GpuOps, RopeAtSize) {
  ExpectOnGpu<TypeParam>(RopeOps<TypeParam>({9001, 1, 0, 1, 128, 128}));
  ExpectOnGpu<TypeParam>(RopeOps<TypeParam>({1501, 1, 64, 16, 64, 0}));
  ExpectOnGpu<TypeParam>(RopeOps<TypeParam>({701, 3, 0, 32, 128, 8}));
}

template <typename T>
auto SwigluOps(int64_t tokens, int64_t d) {
  return [=, in = Normal<T>(tokens * 2 * d, "gate_up", 4),
          dh = Normal<T>(tokens * d, "dh")](auto& run) -> Outputs {
    const TensorRef gate_up = run.In({tokens, 2 * d}, in), h = run.Out({tokens, d}),
                    upstream = run.In({tokens, d}, dh), gradient = run.Out({tokens, 2 * d});
    ANNULUS_CHECK_OK(SwigluForward(run.ctx, gate_up, h));
    ANNULUS_CHECK_OK(SwigluBackward(run.ctx, gate_up, upstream, gradient));
    return {run.Rounded(h), run.Rounded(gradient)};
  };
}

TYPED_TEST(GpuOps, SwigluEdges) {
  for (const auto& [tokens, d] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 64}, {3, 0}, {1, 1}, {5, 7}, {4, 8}, {9, 255}, {3, 1024}, {2, 2056}}) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", d));
    ExpectOnGpu<TypeParam>(SwigluOps<TypeParam>(tokens, d));
  }
}

TYPED_TEST(GpuOps, SwigluAtSize) { ExpectOnGpu<TypeParam>(SwigluOps<TypeParam>(131, 14336)); }

template <typename T>
auto ReluSquaredOps(int64_t tokens, int64_t d) {
  return [=, in = Normal<T>(tokens * d, "x", 4), dh = Normal<T>(tokens * d, "dh")](auto& run) -> Outputs {
    const TensorRef x = run.In({tokens, d}, in), h = run.Out({tokens, d}), gradient = run.In({tokens, d}, dh);
    ANNULUS_CHECK_OK(ReluSquaredForward(run.ctx, x, h));
    ANNULUS_CHECK_OK(ReluSquaredBackward(run.ctx, x, gradient, gradient));
    return {run.Rounded(h), run.Rounded(gradient)};
  };
}

TYPED_TEST(GpuOps, ReluSquaredEdges) {
  for (const auto& [tokens, d] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 64}, {3, 0}, {1, 1}, {5, 7}, {4, 8}, {9, 255}, {3, 1024}, {2, 2056}}) {
    SCOPED_TRACE(absl::StrCat(tokens, " ", d));
    ExpectOnGpu<TypeParam>(ReluSquaredOps<TypeParam>(tokens, d));
  }
}

TYPED_TEST(GpuOps, ReluSquaredAtSize) { ExpectOnGpu<TypeParam>(ReluSquaredOps<TypeParam>(131, 14336)); }

TYPED_TEST(GpuOps, ReluSquaredKeepsNan) {
  ExpectOnGpu<TypeParam>([&](auto& run) -> Outputs {
    const TensorRef x = run.In({1, 3}, {kNan, -kInfinity, 0x1p60}), h = run.Out({1, 3});
    ANNULUS_CHECK_OK(ReluSquaredForward(run.ctx, x, h));
    return {run.Rounded(h)};
  });
}

TYPED_TEST(GpuOps, SwigluOfExtremeGates) {
  const double large = 0x1p125;
  ExpectOnGpu<TypeParam>([&](auto& run) -> Outputs {
    const TensorRef gate_up = run.In({1, 8}, {large, -large, kNan, -1000, 2, 2, 2, 2}), h = run.Out({1, 4});
    ANNULUS_CHECK_OK(SwigluForward(run.ctx, gate_up, h));
    return {run.Rounded(h)};
  });
}

// Whatever allocates, waits or uses another stream fails while a stream is captured.
TYPED_TEST(GpuOps, OnlyEnqueueOnTheirStream) {
  using T = TypeParam;
  OpRun<T> run(kGpu);
  const int64_t n = 64, d = 128;
  const auto values = Normal<T>(n * d, "x");
  const TensorRef x = run.In({n, d}, values), y = run.Out({n, d}), z = run.In({n, d}, values),
                  w = run.In({d}, Normal<T>(d, "w")), h = run.Out({n, d / 2}),
                  heads = run.In({n, 1, d}, values), wide = run.InAccum({n, d}, values),
                  dw = run.InAccum({d}, Normal<float>(d, "dw")), scalar = run.Scalar(0),
                  scale = run.Scalar(0), ids = run.Of({n}, std::vector<int32_t>(static_cast<size_t>(n), 3)),
                  positions = run.Of({n}, std::vector<int64_t>(static_cast<size_t>(n), 9));
  const auto all = [&] {
    Context& ctx = run.ctx;
    for (const absl::Status& status :
         {Zero(ctx, y), Copy(ctx, x, y), Cast(ctx, x, wide), AddInPlace(ctx, x, y), Scale(ctx, 0.5, y),
          AddSumOfSquares(ctx, x, scalar), ClipFactor(ctx, scalar, 1, scale),
          AdamWUpdate(ctx, {.lr = 0.1}, {wide, wide, wide, wide, scale, y}), EmbeddingForward(ctx, ids, x, y),
          EmbeddingBackward(ctx, ids, y, wide), RmsNormForward(ctx, x, w, 1e-5, y),
          RmsNormBackward(ctx, x, w, y, 1e-5, z, dw), SwigluForward(ctx, x, h), SwigluBackward(ctx, x, h, y),
          Rope(ctx, positions, MakeRopeFrequencies(1e4, d / 2), RopeDirection::kForward,
               HeadsOf(heads, 0, 2, d / 2))}) {
      EXPECT_TRUE(status.ok()) << status;
    }
  };
  all();  // scratch memory grows once
  ASSERT_EQ(cudaStreamBeginCapture(run.ctx.stream(), cudaStreamCaptureModeGlobal), cudaSuccess);
  all();
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(run.ctx.stream(), &graph), cudaSuccess);
  size_t nodes = 0;
  EXPECT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
  EXPECT_GE(nodes, 15u);
  cudaGraphDestroy(graph);
}

TEST(GpuArguments, AreRefusedByName) {
  OpRun<float> run(kGpu);
  Context& ctx = run.ctx;
  const TensorRef x = run.Out({4, 8}), wide = run.Of({4, 8}, std::vector<double>(32)),
                  half = run.Of({4, 8}, std::vector<BFloat16>(32)), scale = run.Scalar(1);
  std::vector<float> host(32);
  const TensorRef on_cpu(host.data(), DType::kF32, Device{}, {4, 8});
  ExpectRefused(Scale(ctx, 1, wide), kInvalid, "scale.x=f64[4, 8]: expected f32 or bf16");
  ExpectRefused(AddInPlace(ctx, on_cpu, x), kInvalid, "add.x is on cpu: expected cuda:0");
  ExpectRefused(Cast(ctx, x, wide), kInvalid, "cast.y=f64[4, 8]: expected f32 or bf16");
  ExpectRefused(AdamWUpdate(ctx, {}, {half, half, half, half, scale, TensorRef()}), kInvalid,
                "adamw.param=bf16[4, 8]: expected f32");
  const TensorRef ids = run.Of({4}, std::vector<int32_t>(4));
  ExpectRefused(EmbeddingBackward(ctx, ids, half, half), kInvalid,
                "embedding.dtable=bf16[4, 8] on cuda:0: expected f32[4, 8] on cuda:0");
  const TensorRef long_heads = run.Out({1, 1, 1024}), positions = run.Of({1}, std::vector<int64_t>(1));
  ExpectRefused(Rope(ctx, positions, MakeRopeFrequencies(1e4, 1024), RopeDirection::kForward,
                     HeadsOf(long_heads, 0, 1, 1024)),
                kInvalid, "rope.pairs=512: expected at most 256 on GPUs");
}

}  // namespace
}  // namespace annulus::testing
