// The ops of recurrent layers on GPU 0 through the public API: the scan of state-space layers, the gated
// delta rule and what stands around them. Fails where there is no GPU.
//   *Edges: small shapes, around what one thread, warp, chunk or CTA takes   *AtSize: larger ones

#include "annulus/ops/conv1d.h"
#include "annulus/ops/delta_rule.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/mamba_gates.h"
#include "annulus/ops/taylor_features.h"
#include "gpu/state_space_run.h"

namespace annulus::testing {
namespace {

template <typename T>
class GpuStateSpace : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuStateSpace, GpuTypes);

struct ConvShape {
  int64_t rows, batch, channels, k;
  std::vector<RowRange> segments;
  int64_t document = 0;
};

template <typename T>
auto ConvOps(const ConvShape& s) {
  const int64_t n = s.rows * s.batch * s.channels, segments = static_cast<int64_t>(s.segments.size());
  const Shape halo_shape{segments, s.k - 1, s.batch, s.channels};
  return [=, x0 = Normal<T>(n, "x"), dy0 = Normal<T>(n, "dy"), w0 = Normal<T>(s.channels * s.k, "w", 0.5),
          bias0 = Normal<T>(s.channels, "bias"), halo0 = Normal<T>(halo_shape.elements(), "halo"),
          dw0 = Normal<float>(s.channels * s.k, "dw"),
          dbias0 = Normal<float>(s.channels, "dbias")](auto& run) -> Outputs {
    const Shape shape{s.rows, s.batch, s.channels};
    const TensorRef x = run.In(shape, x0), dy = run.In(shape, dy0), y = run.Out(shape), dx = run.Out(shape),
                    dhalo = run.Out(halo_shape), dw = run.InAccum({s.channels, s.k}, dw0),
                    dbias = run.InAccum({s.channels}, dbias0);
    const auto heads = [&](const TensorRef& t) { return HeadsOf(t, 0, 1, s.channels); };
    const Conv1d conv{.w = run.In({s.channels, s.k}, w0),
                      .bias = run.In({s.channels}, bias0),
                      .ages = run.Of({s.rows, s.batch}, DocumentAges(s.rows, s.batch, s.document)),
                      .segments = s.segments,
                      .halo = run.In(halo_shape, halo0)};
    ANNULUS_CHECK_OK(Conv1dForward(run.ctx, conv, heads(x), heads(y)));
    ANNULUS_CHECK_OK(Conv1dBackward(run.ctx, conv, heads(x), heads(dy),
                                    {.dx = heads(dx), .dhalo = dhalo, .dw = dw, .dbias = dbias}));
    const double norm = 4 * std::sqrt(static_cast<double>(s.rows * s.batch));
    return {run.Rounded(y), run.Rounded(dx), run.Rounded(dhalo), run.Summed(dw, norm),
            run.Summed(dbias, norm)};
  };
}

TYPED_TEST(GpuStateSpace, Conv1dEdges) {
  for (const ConvShape& s :
       {ConvShape{0, 1, 8, 4, {{0, 0}}}, ConvShape{1, 1, 8, 4, {{0, 1}}},
        ConvShape{5, 2, 12, 4, {{0, 3}, {3, 3}, {3, 5}}, 2}, ConvShape{17, 1, 520, 4, {{0, 17}}, 5},
        ConvShape{33, 2, 7, 3, {{0, 16}, {16, 33}}}, ConvShape{40, 1, 16, 1, {{0, 40}}},
        ConvShape{40, 1, 16, 8, {{0, 2}, {2, 40}}, 11}, ConvShape{70, 3, 24, 2, {{0, 35}, {35, 70}}, 9}}) {
    SCOPED_TRACE(absl::StrCat(s.rows, " ", s.batch, " ", s.channels, " ", s.k));
    ExpectOnGpu<TypeParam>(ConvOps<TypeParam>(s));
  }
}

TYPED_TEST(GpuStateSpace, Conv1dAtSize) {
  const auto ops = ConvOps<TypeParam>({4100, 1, 1032, 4, {{0, 2050}, {2050, 4100}}, 700});
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

// kDoubled: as if another rank held the same columns of each group.
enum class Ranks { kOne, kDoubled };
struct NormShape {
  int64_t tokens, groups, group;
  Gate kind;
  bool shared_weight;
  Ranks ranks = Ranks::kOne;
};

template <typename T>
auto NormOps(const NormShape& s) {
  const int64_t columns = s.groups * s.group, n = s.tokens * columns;
  const int64_t weights = s.shared_weight ? s.group : columns;
  return [=, x0 = Normal<T>(n, "x"), g0 = Normal<T>(n, "gate"), dy0 = Normal<T>(n, "dy"),
          w0 = Normal<T>(weights, "w"), dw0 = Normal<float>(weights, "dw")](auto& run) -> Outputs {
    const Shape shape{s.tokens, columns};
    const TensorRef x = run.In(shape, x0), gate = run.In(shape, g0), dy = run.In(shape, dy0),
                    y = run.Out(shape), dx = run.Out(shape), dgate = run.Out(shape),
                    dw = run.InAccum({weights}, dw0);
    GatedNorm norm{
        .x = x, .gate = gate, .w = run.In({weights}, w0), .groups = s.groups, .eps = 1e-5, .kind = s.kind};
    if (s.ranks == Ranks::kDoubled) {
      norm.group_columns = 2 * s.group;
      norm.sum_over_ranks = [&](TensorRef sums) { return Scale(run.ctx, 2, sums); };
    }
    ANNULUS_CHECK_OK(GatedNormForward(run.ctx, norm, y));
    ANNULUS_CHECK_OK(GatedNormBackward(run.ctx, norm, dy, dx, dgate, dw));
    const double bound = 4 * std::sqrt(static_cast<double>(s.tokens * (s.shared_weight ? s.groups : 1)));
    // A gradient is a difference of two terms, of groups of a column nearly the same: w dy over the column.
    const double terms = s.group == 1 ? 100 : 0;
    return {run.Rounded(y), run.Rounded(dx, terms), run.Rounded(dgate, terms), run.Summed(dw, bound)};
  };
}

TYPED_TEST(GpuStateSpace, GatedNormEdges) {
  for (const Gate kind : {Gate::kSiluBefore, Gate::kSiluAfter, Gate::kSigmoidAfter}) {
    for (const NormShape& s :
         {NormShape{0, 1, 8, kind, false}, NormShape{1, 1, 1, kind, false}, NormShape{3, 2, 7, kind, false},
          NormShape{9, 3, 64, kind, true}, NormShape{40, 2, 256, kind, false, Ranks::kDoubled},
          NormShape{7, 1, 640, kind, false}, NormShape{300, 1, 2040, kind, false},
          NormShape{300, 4, 130, kind, true, Ranks::kDoubled}}) {
      SCOPED_TRACE(absl::StrCat(static_cast<int>(kind), " ", s.tokens, " ", s.groups, " ", s.group));
      ExpectOnGpu<TypeParam>(NormOps<TypeParam>(s));
    }
  }
}

// Rows of more vectors than CTAs have threads, which must lie on whole vectors.
TYPED_TEST(GpuStateSpace, GatedNormOfLongRows) {
  const auto ops = NormOps<TypeParam>({6, 1, 8000, Gate::kSiluBefore, false});
  const Outputs naive = NaiveOf<TypeParam>(ops);
  OpRun<double> in_double(Device{});
  OpRun<TypeParam> gpu(kGpu);
  const Outputs wide = ops(in_double), got = ops(gpu);
  for (size_t i = 0; i < wide.size(); ++i) {
    SCOPED_TRACE(absl::StrCat("output ", i));
    ExpectWithinRule(got[i].values, naive[i].values, wide[i].values, wide[i].norm);
  }
}

TYPED_TEST(GpuStateSpace, GatedNormAtSize) {
  const auto ops = NormOps<TypeParam>({3000, 4, 640, Gate::kSiluBefore, false});
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

template <typename T>
auto GateOps(int64_t tokens, int64_t heads, double high) {
  const int64_t n = tokens * heads;
  return [=, raw0 = Normal<T>(n, "raw", 3), bias0 = Normal<float>(heads, "bias"),
          log0 = Normal<float>(heads, "a_log"), ddt0 = Normal<float>(n, "ddt"), da0 = Normal<float>(n, "da"),
          sums0 = Normal<float>(heads, "sums")](auto& run) -> Outputs {
    const Shape shape{tokens, heads};
    const MambaGates gates{.raw = run.In(shape, raw0),
                           .bias = run.InAccum({heads}, bias0),
                           .a_log = run.InAccum({heads}, log0),
                           .low = 0.01,
                           .high = high};
    const TensorRef dt = OutAccum(run, shape), a = OutAccum(run, shape), draw = run.Out(shape),
                    dbias = run.InAccum({heads}, sums0), da_log = run.InAccum({heads}, sums0);
    ANNULUS_CHECK_OK(MambaGatesForward(run.ctx, gates, dt, a));
    ANNULUS_CHECK_OK(MambaGatesBackward(run.ctx, gates, run.InAccum(shape, ddt0), run.InAccum(shape, da0),
                                        draw, dbias, da_log));
    ANNULUS_CHECK_OK(MambaGatesBackward(run.ctx, gates, {}, run.InAccum(shape, da0), draw, dbias, da_log));
    const double norm = 30 * std::sqrt(static_cast<double>(tokens));
    return {run.Summed(dt), run.Summed(a), run.Rounded(draw), run.Summed(dbias, norm),
            run.Summed(da_log, norm)};
  };
}

TYPED_TEST(GpuStateSpace, MambaGatesEdges) {
  for (const int64_t tokens : {0, 1, 255, 256, 1000}) {
    for (const int64_t heads : {1, 31, 80}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", heads));
      ExpectOnGpu<TypeParam>(GateOps<TypeParam>(tokens, heads, heads == 31 ? 0 : 2));
    }
  }
}

template <typename T>
auto FeatureOps(int64_t rows, int64_t heads, int64_t dim) {
  const int64_t features = TaylorFeatures(dim);
  return [=, x0 = Normal<T>(rows * heads * dim, "x"), up0 = Normal<T>(rows * heads * features, "up"),
          num0 = Normal<T>(rows * heads * (dim + 1), "num")](auto& run) -> Outputs {
    const auto of = [&](const TensorRef& t, int64_t d) { return HeadsOf(t, 0, heads, d); };
    const auto out = [&](int64_t d) { return run.Out({rows, 1, heads * d}); };
    std::vector<double> positive = num0;  // denominators away from zero
    for (size_t i = static_cast<size_t>(dim); i < positive.size(); i += static_cast<size_t>(dim + 1)) {
      positive[i] = ToDouble(FromDouble<T>(1 + std::abs(positive[i])));
    }
    const TensorRef x = run.In({rows, 1, heads * dim}, x0), up = run.In({rows, 1, heads * features}, up0),
                    num = run.In({rows, 1, heads * (dim + 1)}, positive);
    const TensorRef phi = out(features), dx = out(dim), o = out(dim), dnum = out(dim + 1),
                    ones = out(dim + 1), back = out(dim), unit = out(dim), dunit = out(dim);
    ANNULUS_CHECK_OK(TaylorFeaturesForward(run.ctx, of(x, dim), of(phi, features)));
    ANNULUS_CHECK_OK(TaylorFeaturesBackward(run.ctx, of(x, dim), of(up, features), of(dx, dim)));
    ANNULUS_CHECK_OK(NormaliseForward(run.ctx, of(num, dim + 1), 1e-3, of(o, dim)));
    ANNULUS_CHECK_OK(NormaliseBackward(run.ctx, of(num, dim + 1), 1e-3, of(x, dim), of(dnum, dim + 1)));
    ANNULUS_CHECK_OK(AppendOnes(run.ctx, of(x, dim), of(ones, dim + 1)));
    ANNULUS_CHECK_OK(DropLastColumn(run.ctx, of(num, dim + 1), of(back, dim)));
    ANNULUS_CHECK_OK(L2NormForward(run.ctx, of(x, dim), 1e-6, of(unit, dim)));
    ANNULUS_CHECK_OK(L2NormBackward(run.ctx, of(x, dim), 1e-6, of(back, dim), of(dunit, dim)));
    Outputs outputs;
    for (const TensorRef& t : {phi, dx, o, dnum, ones, back, unit}) outputs.push_back(run.Rounded(t));
    // A difference of two terms, of heads of one element the same: dy over the element.
    outputs.push_back(run.Rounded(dunit, dim == 1 ? 100 : 0));
    return outputs;
  };
}

TYPED_TEST(GpuStateSpace, FeaturesAndNormsOfHeadsEdges) {
  for (const int64_t dim : {1, 3, 16, 33}) {
    for (const int64_t rows : {0, 1, 37}) {
      SCOPED_TRACE(absl::StrCat(dim, " ", rows));
      ExpectOnGpu<TypeParam>(FeatureOps<TypeParam>(rows, 3, dim));
    }
  }
}

// States are f32 whatever the compute dtype.
auto StateOps(int64_t count, int64_t k, int64_t v) {
  return [=, factors0 = Normal<float>(2 * count, "factors"),
          matrix0 = Normal<float>(2 * count * k * k, "matrix"), in0 = Normal<float>(2 * count * k * v, "in"),
          state0 = Normal<float>(2 * count * k * v, "state")](auto& run) -> Outputs {
    const Shape shape{2, count, k, v};
    const TensorRef factors = run.InAccum({2, count}, factors0),
                    matrix = run.InAccum({2, count, k * k}, matrix0), in = run.InAccum(shape, in0),
                    state = run.InAccum(shape, state0), scaled = OutAccum(run, shape),
                    plain = OutAccum(run, shape), started = OutAccum(run, shape),
                    in_place = run.InAccum(shape, in0), both = OutAccum(run, {2, count}),
                    product = OutAccum(run, {2, count, k * k});
    ANNULUS_CHECK_OK(AdvanceState(run.ctx, factors, Transpose::kNo, in, state, scaled));
    ANNULUS_CHECK_OK(AdvanceState(run.ctx, matrix, Transpose::kNo, in, state, plain));
    ANNULUS_CHECK_OK(AdvanceState(run.ctx, matrix, Transpose::kNo, {}, state, started));
    ANNULUS_CHECK_OK(AdvanceState(run.ctx, matrix, Transpose::kYes, in_place, state, in_place));
    ANNULUS_CHECK_OK(ComposeTransitions(run.ctx, factors, factors, both));
    ANNULUS_CHECK_OK(ComposeTransitions(run.ctx, matrix, matrix, product));
    const double norm = static_cast<double>(4 * k);
    return {run.Summed(scaled),         run.Summed(plain, norm), run.Summed(started),
            run.Summed(in_place, norm), run.Summed(both),        run.Summed(product, norm)};
  };
}

TEST(GpuStates, AdvanceAndComposeEdges) {
  for (const auto& [count, k, v] :
       {std::tuple<int64_t, int64_t, int64_t>{0, 4, 4}, {1, 1, 1}, {3, 5, 33}, {2, 128, 64}, {2, 64, 31}}) {
    SCOPED_TRACE(absl::StrCat(count, " ", k, " ", v));
    ExpectOnGpu<float>(StateOps(count, k, v));
  }
}

// Sizes at which the plain kernels work, whatever the dtype.
std::vector<SsdShape> PlainShapes() {
  std::vector<SsdShape> shapes;
  for (const int64_t rows : {0, 1, 7, 8, 9, 50}) {
    shapes.push_back({.rows = rows,
                      .batch = 2,
                      .heads = 4,
                      .groups = 2,
                      .head_dim = 5,
                      .state = 3,
                      .chunk = 8,
                      .document = 21});
  }
  shapes.push_back({.rows = 150,
                    .heads = 2,
                    .head_dim = 65,
                    .state = 273,
                    .chunk = 64,
                    .segments = SegmentsOf(150, {70})});
  shapes.push_back({.rows = 10,
                    .heads = 2,
                    .head_dim = 4,
                    .state = 3,
                    .chunk = 4,
                    .segments = {{0, 0}, {0, 10}, {10, 10}}});
  return shapes;
}

TYPED_TEST(GpuStateSpace, ScanEdges) {
  for (const SsdShape& s : PlainShapes()) {
    SCOPED_TRACE(Describe(s));
    ExpectOnGpu<TypeParam>(ScanOps<TypeParam>(SlowAndFast(s), Gates::kAll));
  }
}

TYPED_TEST(GpuStateSpace, LinearAttentionEdges) {
  const SsdShape s{.rows = 40, .heads = 2, .groups = 2, .head_dim = 12, .state = 9, .chunk = 16};
  ExpectOnGpu<TypeParam>(ScanOps<TypeParam>(SlowAndFast(s), Gates::kDecaysAlone));
}

// Sizes that tensor cores take, in bf16.
std::vector<SsdShape> MmaShapes() {
  std::vector<SsdShape> shapes;
  for (const int64_t rows : {1, 63, 64, 65, 127, 128, 129, 300}) {
    for (const int64_t document : {0, 50}) {
      shapes.push_back({.rows = rows,
                        .heads = 3,
                        .groups = 1,
                        .head_dim = 64,
                        .state = 128,
                        .chunk = 128,
                        .document = document});
    }
  }
  for (const int64_t state : {64, 128}) {
    for (const int64_t dim : {64, 128}) {
      shapes.push_back({.rows = 420,
                        .batch = 2,
                        .heads = 4,
                        .groups = 2,
                        .head_dim = dim,
                        .state = state,
                        .chunk = 128,
                        .segments = SegmentsOf(420, {200}),
                        .document = 333});
    }
  }
  // More heads to a group than one CTA takes, and an odd number of them.
  shapes.push_back({.rows = 260, .heads = 17, .head_dim = 64, .state = 64, .chunk = 128, .document = 100});
  shapes.push_back({.rows = 200,
                    .heads = 2,
                    .groups = 2,
                    .head_dim = 64,
                    .state = 64,
                    .chunk = 128,
                    .segments = {{0, 0}, {0, 200}, {200, 200}}});
  return shapes;
}

TEST(GpuScanOnTensorCores, Edges) {
  for (const SsdShape& s : MmaShapes()) {
    SCOPED_TRACE(Describe(s));
    const SsdValues<double> values = Bf16Inputs(SlowAndFast(s));
    ExpectOnGpu<BFloat16>(ScanOps<BFloat16>(values, Gates::kAll), ChunkedNaive(values, Gates::kAll));
  }
}

TEST(GpuScanOnTensorCores, LinearAttention) {
  const SsdShape s{.rows = 300, .heads = 2, .groups = 2, .head_dim = 128, .state = 128, .chunk = 128};
  const SsdValues<double> values = Bf16Inputs(SlowAndFast(s));
  ExpectOnGpu<BFloat16>(ScanOps<BFloat16>(values, Gates::kDecaysAlone),
                        ChunkedNaive(values, Gates::kDecaysAlone));
}

// Several chunks to a super, of which one is cut short, in two segments.
TEST(GpuScanOnTensorCores, AtSize) {
  const SsdShape s{.rows = 1100,
                   .heads = 128,
                   .groups = 128,
                   .head_dim = 64,
                   .state = 64,
                   .chunk = 128,
                   .segments = SegmentsOf(1100, {600}),
                   .document = 900};
  const SsdValues<double> values = Bf16Inputs(SlowAndFast(s));
  const auto ops = ScanOps<BFloat16>(values, Gates::kAll);
  ExpectOnGpu<BFloat16>(ops, ChunkedNaive(values, Gates::kAll));
  ExpectSameBitsTwice<BFloat16>(ops);
}

// Decays that would overflow above the diagonal, and steps of zero.
TEST(GpuScanOnTensorCores, StrongDecaysAndZeroStepsStayFinite) {
  const SsdShape s{.rows = 200, .heads = 2, .head_dim = 64, .state = 64, .chunk = 128, .document = 90};
  SsdValues<double> values = Bf16Inputs(RandomSsd<double>(s));
  for (size_t i = 0; i < values.a.size(); ++i) {
    if (i % 5 == 0) values.a[i] *= 1000;
    if (i % 7 == 0) values.dt[i] = 0;
  }
  values.a = Rounded<float>(values.a);
  ExpectOnGpu<BFloat16>(ScanOps<BFloat16>(values, Gates::kAll), ChunkedNaive(values, Gates::kAll));
}

// Where nothing is left of a row in the next one, it gives sums of decays what it takes from them.
TEST(GpuScan, DecaysOfRowsThatForgetAtOnceGetNothing) {
  SsdValues<double> values = RandomSsd<double>(
      {.rows = 300, .batch = 2, .heads = 3, .groups = 1, .head_dim = 40, .state = 20, .chunk = 128});
  values.a.assign(values.a.size(), -60);
  values.dt = Rounded<float>(values.dt);
  OpRun<float> gpu(kGpu);
  const Outputs got = ScanOps<float>(values, Gates::kAll)(gpu);
  EXPECT_GT(MaxAbs(got[9].values), 1);  // of dt
  // Products of f32 are exact in double: what is left is their sums' rounding, 2^-53 of a few thousand.
  EXPECT_LT(MaxAbs(got[8].values), 1e-9);
}

TYPED_TEST(GpuStateSpace, DeltaRuleEdges) {
  for (const DeltaShape& s :
       {DeltaShape{0, 1, 2, 4, 4, 4, {{0, 0}}}, DeltaShape{1, 1, 1, 1, 1, 4, {{0, 1}}},
        DeltaShape{9, 2, 2, 5, 3, 4, {{0, 9}}, 6}, DeltaShape{30, 1, 2, 8, 40, 8, {{0, 14}, {14, 30}}, 11},
        DeltaShape{10, 1, 2, 4, 4, 4, {{0, 0}, {0, 10}, {10, 10}}},
        DeltaShape{150, 1, 2, 64, 96, 64, {{0, 70}, {70, 150}}}}) {
    SCOPED_TRACE(absl::StrCat(s.rows, " ", s.key_dim, " ", s.value_dim, " ", s.chunk));
    ExpectOnGpu<TypeParam>(DeltaOps<TypeParam>(s));
  }
}

TYPED_TEST(GpuStateSpace, DeltaRuleAtSize) {
  const auto ops = DeltaOps<TypeParam>({700, 1, 2, 128, 128, 64, {{0, 700}}, 450});
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

}  // namespace
}  // namespace annulus::testing
