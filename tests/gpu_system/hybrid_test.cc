// Hybrid models train on GPUs as on CPUs: whole runs of the `annulus` program with a sequence split over two
// ranks, and with layers split over two ranks.

#include "gpu_system/train_run.h"

namespace annulus::testing {
namespace {

// 300 positions give every rank of two padding. Heads and states are of sizes that the kernels for bf16 take.
constexpr char kConfig[] = R"(name: "hybrid"
seed: 5
device: CUDA
step_deadline_seconds: 60
model {
  pattern: "M - M A -"
  d_model: 64
  attention { heads: 2 kv_heads: 1 head_dim: 64 rope: NONE }
  latent { heads: 2 q_rank: 48 kv_rank: 64 nope_dim: 32 rope_dim: 32 v_dim: 64 }
  mamba { heads: 4 head_dim: 64 state: 64 groups: 2 chunk: 128 }
  lightning { heads: 2 key_dim: 64 value_dim: 64 chunk: 128 }
  based { heads: 2 key_dim: 8 value_dim: 32 chunk: 64 }
  delta { heads: 2 key_dim: 64 value_dim: 64 chunk: 64 }
  mlp { d_ff: 176 }
}
data {
  train { text { path: "%s" } }
  validation_fraction: 0.05
  seq_len: 300
}
optim {
  adamw { lr: 1e-3 }
  schedule { constant { warmup_steps: 10 } }
  steps: 20
  sequences_per_step: 4
  micro_batch: 2
}
eval { every_steps: 10 sequences: 4 }
)";

struct Model {
  const char* name;
  Strings overrides;
};
void PrintTo(const Model& model, std::ostream* out) { *out << model.name; }
const Model kModels[] = {
    {"nemotron_h", {"model.pattern=M - M A -", "model.mlp.activation=RELU_SQUARED"}},
    {"mamba_tpla", {"model.pattern=(M -)^2 T{g=2} -"}},
    {"falcon_h1", {"model.pattern=(M+A{rope=10000} -)^2"}},
    {"linear", {"model.pattern=L - G - B - A{w=64} -"}},
};

class HybridTraining : public GpuTraining, public ::testing::WithParamInterface<Model> {
 protected:
  HybridTraining() : GpuTraining(kConfig) {}
};

// How far losses may be from those of the run in f32 on the CPU. With these models f32 on the CPU is within
// 6e-8 of f64 for 20 steps: 30 times that. Their naive decoder in bf16 (model_rounded.h, with masters in f64)
// is within 4.2e-4: 4 times that.
struct Case {
  const char* compute;
  TrainMesh mesh;
  double bound;
};
constexpr double kF32 = 2e-6, kBf16 = 2e-3;
const Case kCases[] = {{"F32", {}, kF32},   {"F32", {.cp = 2}, kF32},   {"F32", {.tp = 2}, kF32},
                       {"BF16", {}, kBf16}, {"BF16", {.cp = 2}, kBf16}, {"BF16", {.tp = 2}, kBf16}};

TEST_P(HybridTraining, LossFollowsTheCpu) {
  const Strings& model = GetParam().overrides;
  Train({}, "cpu", Joined({"device=CPU", "compute=F32"}, model));
  const std::vector<nlohmann::json> losses = ReadMetrics(Path("cpu"));
  ASSERT_EQ(losses.size(), 20u);
  EXPECT_LT(losses.back()["loss"].get<double>(), 0.8 * losses.front()["loss"].get<double>());
  for (const auto& [compute, mesh, bound] : kCases) {
    const std::string run = absl::StrCat(compute, " ", mesh.Name());
    SCOPED_TRACE(run);
    Train(mesh, run, Joined({absl::StrCat("compute=", compute)}, model));
    ExpectWholeMetrics(Path(run), 20, 10);
    const double difference = LossDifference(Path(run), Path("cpu"), 20);
    std::cout << run << ": losses within " << difference << " of the CPU's\n";
    EXPECT_LE(difference, bound);
    if (bound > kF32) {
      EXPECT_GT(difference, kF32) << "bf16 is not what ran";
    }
  }
}

TEST_P(HybridTraining, DeterministicRunsAreEqualBitForBit) {
  const Strings overrides =
      Joined({"compute=BF16", "deterministic=true", "optim.steps=10"}, GetParam().overrides);
  Train({.cp = 2}, "first", overrides);
  Train({.cp = 2}, "second", overrides);
  ExpectSameRun("second", "first");
}

INSTANTIATE_TEST_SUITE_P(Models, HybridTraining, ::testing::ValuesIn(kModels),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace annulus::testing
