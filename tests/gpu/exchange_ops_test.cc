// Ops between slots of exchange plans, on GPU 0: columns moved and added, partial results merged.
//   *Edges: small shapes, around what one thread, warp or CTA takes   *AtSize: larger ones

#include "annulus/ops/attention.h"
#include "annulus/ops/columns.h"
#include "gpu/gpu_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class GpuExchangeOps : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuExchangeOps, GpuTypes);

struct MoveShape {
  const char* name;
  int64_t rows, batch, from, to;
  std::vector<ColumnRun> runs;
};

// Heads of `dim` columns, the first of which go last.
std::vector<ColumnRun> Backwards(int64_t heads, int64_t dim) {
  std::vector<ColumnRun> runs;
  for (int64_t head = 0; head < heads; ++head) runs.push_back({head * dim, (heads - 1 - head) * dim, dim});
  return runs;
}

// Between every pair of dtypes that slots have, overwriting and adding.
template <typename T>
auto MoveOps(const MoveShape& s) {
  const int64_t x_elements = s.rows * s.batch * s.from, y_elements = s.rows * s.batch * s.to;
  return
      [=, x = Normal<T>(x_elements, "x"), wide_x = Normal<float>(x_elements, "wide x"),
       y = Normal<T>(y_elements, "y"), wide_y = Normal<float>(y_elements, "wide y")](auto& run) -> Outputs {
        const Shape from{s.rows, s.batch, s.from}, to{s.rows, s.batch, s.to};
        const TensorRef in = run.In(from, x), sum = run.InAccum(from, wide_x);
        Outputs outputs;
        for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
          const TensorRef copied = run.In(to, y), added = run.InAccum(to, wide_y), rounded = run.In(to, y),
                          passed = run.InAccum(to, wide_y);
          ANNULUS_CHECK_OK(MoveColumns(run.ctx, in, s.runs, write, copied));
          ANNULUS_CHECK_OK(MoveColumns(run.ctx, in, s.runs, write, added));
          ANNULUS_CHECK_OK(MoveColumns(run.ctx, sum, s.runs, write, rounded));
          ANNULUS_CHECK_OK(MoveColumns(run.ctx, sum, s.runs, write, passed));
          outputs.insert(outputs.end(),
                         {run.Rounded(copied), run.Summed(added), run.Rounded(rounded), run.Summed(passed)});
        }
        return outputs;
      };
}

TYPED_TEST(GpuExchangeOps, MoveColumnsEdges) {
  const std::vector<MoveShape> shapes = {
      {"no rows", 0, 2, 8, 8, {{0, 0, 8}}},
      {"no runs", 3, 1, 8, 8, {}},
      {"one column", 5, 1, 3, 2, {{2, 1, 1}}},
      {"statistics of heads", 33, 2, 12, 5, {{7, 0, 5}}},
      {"keys and values of some heads", 17, 2, 96, 48, {{16, 0, 16}, {64, 16, 32}}},
      {"off vectors", 17, 2, 96, 48, {{3, 1, 17}, {64, 30, 18}}},
      {"a head twice", 9, 1, 64, 96, {{32, 0, 32}, {32, 32, 32}, {0, 64, 32}}},
      {"sums of heads", 9, 1, 96, 64, {{0, 0, 32}, {32, 0, 32}, {64, 32, 32}}},
      {"sums that overlap by a part", 9, 1, 96, 64, {{0, 0, 32}, {32, 16, 32}}},
      {"more runs than a launch takes", 5, 1, 40 * 8, 40 * 8, Backwards(40, 8)},
      {"a row of several CTAs", 2, 1, 5000, 4200, {{8, 0, 4200}}}};
  for (const MoveShape& shape : shapes) {
    SCOPED_TRACE(shape.name);
    ExpectOnGpu<TypeParam>(MoveOps<TypeParam>(shape));
  }
}

TYPED_TEST(GpuExchangeOps, MoveColumnsAtSize) {
  ExpectOnGpu<TypeParam>(
      MoveOps<TypeParam>({"a group of heads", 3001, 1, 2048, 1024, {{256, 0, 512}, {1280, 512, 512}}}));
}

struct MergeShape {
  int64_t rows, batch, heads, dim;
};

// Heads [1, 1 + heads) of a result of heads + 2, into heads [0, heads) of another. Where an LSE is -inf the
// output is NaN; every ninth has no keys on either side.
template <typename T>
auto MergeOps(const MergeShape& s) {
  const int64_t there = s.heads + 2, here = s.heads + 1, tokens = s.rows * s.batch;
  auto out = Normal<T>(tokens * there * s.dim, "out"), into = Normal<float>(tokens * here * s.dim, "into");
  auto lse = Normal<float>(tokens * there, "lse", 4), into_lse = Normal<float>(tokens * here, "into lse", 4);
  const auto empty = [&](std::vector<double>* values, std::vector<double>* sums, int64_t at) {
    (*sums)[static_cast<size_t>(at)] = -HUGE_VAL;
    std::fill_n(values->begin() + at * s.dim, s.dim, std::nan(""));
  };
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t stat = token * s.heads + head;
      if (stat % 3 == 0) empty(&out, &lse, token * there + head + 1);
      if (stat % 3 == 1 || stat % 9 == 0) empty(&into, &into_lse, token * here + head);
    }
    // What lies beside the heads holds keys, so that no NaN stays in the result.
  }
  return [=](auto& run) -> Outputs {
    Outputs outputs;
    for (const bool wide : {false, true}) {
      const Shape from{s.rows, s.batch, there * s.dim}, to{s.rows, s.batch, here * s.dim};
      const TensorRef x = wide ? run.InAccum(from, out) : run.In(from, out),
                      x_lse = run.InAccum({s.rows, s.batch, there}, lse), y = run.InAccum(to, into),
                      y_lse = run.InAccum({s.rows, s.batch, here}, into_lse);
      ANNULUS_CHECK_OK(MergePartials(run.ctx, {.out = HeadsOf(x, s.dim, s.heads, s.dim),
                                               .lse = HeadsOf(x_lse, 1, s.heads, 1),
                                               .into_out = HeadsOf(y, 0, s.heads, s.dim),
                                               .into_lse = HeadsOf(y_lse, 0, s.heads, 1)}));
      outputs.insert(outputs.end(), {run.Summed(y), run.Summed(y_lse)});
    }
    return outputs;
  };
}

TYPED_TEST(GpuExchangeOps, MergePartialsEdges) {
  for (const int64_t dim : {1, 4, 5, 32, 40, 64, 96, 128, 192}) {
    for (const MergeShape& shape :
         {MergeShape{0, 1, 2, dim}, MergeShape{1, 1, 1, dim}, MergeShape{37, 2, 3, dim}}) {
      SCOPED_TRACE(absl::StrCat(shape.rows, " ", shape.batch, " ", shape.heads, " ", dim));
      ExpectOnGpu<TypeParam>(MergeOps<TypeParam>(shape));
    }
  }
}

TYPED_TEST(GpuExchangeOps, MergePartialsAtSize) {
  const auto ops = MergeOps<TypeParam>({1001, 1, 16, 128});
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

}  // namespace
}  // namespace annulus::testing
