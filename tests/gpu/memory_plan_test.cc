// The plan of a rank's memory in bf16 against what training of every kind of layer takes on GPU 0.

#include <gtest/gtest.h>

#include "annulus/device/gpu.h"
#include "annulus/model/cost.h"
#include "annulus/train/optimizer.h"
#include "gpu/gpu_harness.h"
#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

constexpr BatchShape kShape{.length = 512, .batch = 2};
// The delta rule's sums take 27 MB of it, BASED's features 17 MB, all others under 1 MB.
constexpr int64_t kMostOfKernels = 28 << 20;

// Heads as kernels for bf16 have them; every allocation of a pass is a multiple of the arena's alignment.
ModelSpec SpecOf(absl::string_view pattern) {
  const absl::StatusOr<Pattern> parsed = ParsePattern(pattern, {});
  ANNULUS_CHECK(parsed.ok()) << parsed.status();
  ModelSpec spec = SmallSpec(parsed->layers);
  spec.d_model = 128, spec.vocab_size = 128, spec.head_dim = 64, spec.d_ff = 256;
  spec.latent = {.heads = 4, .q_rank = 64, .kv_rank = 128, .nope_dim = 128, .rope_dim = 64, .v_dim = 128};
  spec.mamba = {.heads = 8, .head_dim = 64, .state = 64, .groups = 4, .conv = 4, .chunk = 128};
  spec.lightning = {.heads = 8, .key_dim = 64, .value_dim = 64, .chunk = 128};
  spec.based = {.heads = 8, .key_dim = 16, .value_dim = 63, .chunk = 128};
  spec.delta = {.heads = 8, .key_dim = 64, .value_dim = 64, .conv = 4, .chunk = 64};
  return spec;
}

class MemoryOnGpu : public ::testing::TestWithParam<const char*> {};

// What kernels take for themselves comes on top of the temporaries. Sums of the gradients of keys and values
// in f32, which the own kernels of attention need, are planned also where cuDNN does without them.
TEST_P(MemoryOnGpu, PlanIsWhatTrainingHolds) {
  ANNULUS_CHECK(GpuCount() > 0) << "this test needs a GPU: " << WhyNoGpu();
  ANNULUS_CHECK_OK(UseGpu(kGpu.index));
  const ModelSpec spec = SpecOf(GetParam());
  const WholeBatch batch = RandomBatch(spec, kShape);
  for (const Recompute recompute :
       {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput, Recompute::kBlock}) {
    SCOPED_TRACE(static_cast<int>(recompute));
    const MeshRun run{.dtype = DType::kBF16, .recompute = recompute};
    const ProcessMesh mesh = ProcessMesh::Create({}, MakeLoopbackGroup(1)[0]).value();
    Context ctx(kGpu);
    RankModel model(spec, batch, run, mesh, ctx);
    model.LossAndGradients();
    const ShardedAdamW optimizer(ctx, {}, spec, model.params(), {mesh.dp_cp, model.tensor()});
    const MemoryPlan plan = PlanMemory(spec, {.device = DeviceKind::kCuda,
                                              .dtype = DType::kBF16,
                                              .local_tokens = kShape.length * kShape.batch,
                                              .sequences = kShape.batch,
                                              .recompute = recompute});
    EXPECT_EQ(plan.parameters, model.params().bytes());
    EXPECT_EQ(plan.gradients, model.params().gradient_bytes());
    EXPECT_EQ(plan.optimizer, optimizer.state_bytes());
    EXPECT_EQ(plan.activations, ctx.saved.high_water_bytes());
    const bool latent = Uses(spec, BranchKind::kLatentAttention);
    const int64_t kv_columns =
        spec.latent.heads * (spec.latent.nope_dim + spec.latent.rope_dim + spec.latent.v_dim);
    const int64_t without_sums = latent ? kShape.length * kShape.batch * kv_columns * SizeOf(DType::kF32) : 0;
    EXPECT_LE(plan.workspace - without_sums, ctx.scratch.high_water_bytes());
    EXPECT_GE(plan.workspace + kMostOfKernels, ctx.scratch.high_water_bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, MemoryOnGpu,
                         ::testing::Values("A", "-", "M", "L", "B", "G", "T", "T{g=2}", "M+A -"),
                         [](const auto& info) { return absl::StrCat(info.index); });

}  // namespace
}  // namespace annulus::testing
