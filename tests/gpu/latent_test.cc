// Packing of latent attention's keys and values, gradients of latents over many ranks, and rotary positions
// of a part of a head, on GPU 0. Fails where there is none.

#include "annulus/ops/latent_kv.h"
#include "annulus/ops/rope.h"
#include "annulus/parallel/latent_expansion.h"
#include "gpu/gpu_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class GpuLatents : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuLatents, GpuTypes);

// k_rope and its gradient are columns of wider rows.
template <typename T>
auto LatentOps(int64_t tokens, const LatentHeads& s) {
  const int64_t latent = 16, row = latent + s.rope;
  return [=, up_values = Normal<T>(tokens * s.up_columns(), "up"), latents = Normal<T>(tokens * row, "l"),
          gradient = Normal<T>(tokens * s.kv_columns(), "dkv"),
          before = Normal<T>(tokens * row, "before")](auto& run) -> Outputs {
    const TensorRef up = run.In({tokens, s.up_columns()}, up_values), kv = run.Out({tokens, s.kv_columns()});
    const TensorRef rows = run.In({tokens, row}, latents), dup = run.Out({tokens, s.up_columns()});
    const TensorRef dup_of_sums = run.Out({tokens, s.up_columns()});
    const TensorRef dkv = run.In({tokens, s.kv_columns()}, gradient);
    const TensorRef sums = run.InAccum({tokens, s.kv_columns()}, gradient);
    const TensorRef drows = run.InAccum({tokens, row}, before);
    const auto rope = [&](const TensorRef& of) { return MatrixRef(of).Cols(latent, row); };
    ANNULUS_CHECK_OK(PackLatentKv(run.ctx, s, up, rope(rows), kv));
    ANNULUS_CHECK_OK(UnpackLatentKvGradient(run.ctx, s, dkv, dup, Write::kOverwrite, rope(drows)));
    ANNULUS_CHECK_OK(UnpackLatentKvGradient(run.ctx, s, sums, dup_of_sums, Write::kAccumulate, rope(drows)));
    return {run.Rounded(kv), run.Rounded(dup), run.Rounded(dup_of_sums), run.Summed(drows)};
  };
}

TYPED_TEST(GpuLatents, PackEdges) {
  for (const LatentHeads& s : {LatentHeads{1, 1, 2, 1}, LatentHeads{3, 5, 4, 7}, LatentHeads{4, 8, 8, 16},
                               LatentHeads{5, 16, 24, 8}, LatentHeads{2, 8, 520, 8}}) {
    for (const int64_t tokens : {0, 1, 7}) {
      SCOPED_TRACE(absl::StrCat(s.heads, " ", s.nope, " ", s.rope, " ", s.v, " ", tokens));
      ExpectOnGpu<TypeParam>(LatentOps<TypeParam>(tokens, s));
    }
  }
}

TYPED_TEST(GpuLatents, PackAtSize) {
  const auto ops = LatentOps<TypeParam>(97, {.heads = 128, .nope = 128, .rope = 64, .v = 128});
  ExpectOnGpu<TypeParam>(ops);
  ExpectSameBitsTwice<TypeParam>(ops);
}

// Whole numbers that bf16 holds, from -8 to 8.
std::vector<double> Integers(int64_t n, absl::string_view stream) {
  const RandomStream random(3, stream);
  std::vector<double> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(random.Below(i, 17)) - 8;
  return values;
}

// Gradients come from as many ranks as a ring has. Each rank's summand and their sum are whole numbers far
// beyond those that bf16 holds, and within those of f32: not a bit may be lost, with 64 ranks as with one.
TYPED_TEST(GpuLatents, GradientsOfManyRanksAreSumsInF32) {
  using T = TypeParam;
  const LatentShape shape{.columns = 24, .nope = 32, .rope = 16, .v = 40};
  const int64_t heads = 16, tokens = 9, up_rows = heads * (shape.nope + shape.v);
  const int64_t k_dim = shape.nope + shape.rope, kv_columns = heads * (k_dim + shape.v);
  const std::vector<double> up = Integers(up_rows * shape.columns, "up"),
                            latents = Integers(tokens * shape.row(), "latents");
  for (const int64_t ranks : {1, 3, 64}) {
    SCOPED_TRACE(ranks);
    OpRun<T> run(kGpu);
    const TensorRef up_ref = run.In({up_rows, shape.columns}, up);
    const TensorRef rows = run.In({tokens, 1, shape.row()}, latents);
    const LatentWeights weights{
        .up = up_ref,
        .dup = run.InAccum({up_rows, shape.columns}, std::vector<double>(up.size()))};
    const TensorRef sum = run.InAccum({tokens, 1, shape.row()}, std::vector<double>(latents.size()));
    std::vector<double> want(latents.size());
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const std::vector<double> dkv = Integers(tokens * kv_columns, absl::StrCat("rank ", rank));
      ANNULUS_CHECK_OK(ExpandLatentsBackward(run.ctx, shape, weights, rows,
                                             run.InAccum({tokens, 1, kv_columns}, dkv), Write::kAccumulate,
                                             sum));
      for (int64_t t = 0; t < tokens; ++t) {
        double* row = &want[static_cast<size_t>(t * shape.row())];
        const double* of_token = &dkv[static_cast<size_t>(t * kv_columns)];
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t i = 0; i < shape.nope + shape.v; ++i) {
            const double d = i < shape.nope ? of_token[h * k_dim + i]
                                            : of_token[heads * k_dim + h * shape.v + i - shape.nope];
            const double* weight = &up[static_cast<size_t>((h * (shape.nope + shape.v) + i) * shape.columns)];
            for (int64_t c = 0; c < shape.columns; ++c) row[c] += d * weight[c];
          }
          for (int64_t i = 0; i < shape.rope; ++i)
            row[shape.columns + i] += of_token[h * k_dim + shape.nope + i];
        }
      }
    }
    EXPECT_EQ(run.Summed(sum).values, want);
  }
}

// The first elements of each head stay, the others are turned and scaled.
TYPED_TEST(GpuLatents, RopeOfAPartEdges) {
  using T = TypeParam;
  for (const auto& [first, dim] : {std::pair<int64_t, int64_t>{3, 4}, {8, 16}, {128, 64}, {5, 0}}) {
    const int64_t rows = 9, batch = 2, heads = 3, columns = heads * (first + dim);
    std::vector<int64_t> positions;
    for (int64_t r = 0; r < rows; ++r) positions.push_back(r < 4 ? r : 1000000 + 77 * r);
    const std::vector<double> values = Normal<T>(rows * batch * columns, "x");
    RopeFrequencies frequencies =
        MakeRopeFrequencies(10000, dim, YarnRope{.factor = 40, .original_length = 4096});
    frequencies.scale = 1.25;
    ExpectOnGpu<T>([&, first = first](auto& run) -> Outputs {
      const TensorRef at = run.Of({rows}, positions);
      Outputs outputs;
      for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kGradient}) {
        const TensorRef x = run.In({rows, batch, columns}, values);
        ANNULUS_CHECK_OK(
            Rope(run.ctx, at, frequencies, direction, HeadsOf(x, 0, heads, columns / heads), first));
        outputs.push_back(run.Rounded(x));
      }
      return outputs;
    });
  }
}

}  // namespace
}  // namespace annulus::testing
