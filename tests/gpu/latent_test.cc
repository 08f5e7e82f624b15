// Packing of latent attention's keys and values, and rotary positions of a part of a head, on GPU 0. Fails
// where there is none.

#include "annulus/ops/latent_kv.h"
#include "annulus/ops/rope.h"
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
