// The plan of a rank's memory against what training takes.

#include <gtest/gtest.h>

#include <mutex>

#include "absl/strings/match.h"
#include "annulus/model/cost.h"
#include "annulus/train/optimizer.h"
#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// What one rank really holds, by the largest.
struct Held {
  int64_t parameters = 0, gradients = 0, optimizer = 0, saved = 0, scratch = 0;
};

Held MeasureTraining(const ModelSpec& spec, const WholeBatch& batch, const MeshRun& run) {
  Held held;
  std::mutex mutex;
  OnMesh(spec, batch, run, [&](RankModel& model) {
    model.LossAndGradients();
    const ShardedAdamW optimizer(model.ctx(), {}, spec, model.params(), {model.mesh().dp_cp, model.tensor()});
    const std::lock_guard<std::mutex> lock(mutex);
    held.parameters = std::max(held.parameters, model.params().bytes());
    held.gradients = std::max(held.gradients, model.params().gradient_bytes());
    held.optimizer = std::max(held.optimizer, optimizer.state_bytes());
    held.saved = std::max(held.saved, model.ctx().saved.high_water_bytes());
    held.scratch = std::max(held.scratch, model.ctx().scratch.high_water_bytes());
  });
  return held;
}

// Sizes of which every allocation of a pass is a multiple of the arena's alignment: the plan can be held to
// the byte. Together they fit the arena's first block.
ModelSpec AlignedSpec(absl::string_view pattern, int64_t vocab) {
  const absl::StatusOr<Pattern> parsed = ParsePattern(pattern, {});
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  ModelSpec spec = SmallSpec(parsed->layers);
  spec.vocab_size = vocab;
  spec.latent = {.heads = 4, .q_rank = 8, .kv_rank = 16, .nope_dim = 6, .rope_dim = 4, .v_dim = 5};
  spec.mamba = {.heads = 8, .head_dim = 8, .state = 16, .groups = 4, .conv = 5, .chunk = 32};
  spec.lightning = {.heads = 8, .key_dim = 8, .value_dim = 16, .chunk = 32};
  spec.based = {.heads = 8, .key_dim = 3, .value_dim = 15, .chunk = 32};
  spec.delta = {.heads = 8, .key_dim = 8, .value_dim = 16, .conv = 5, .chunk = 32};
  return spec;
}

MemoryPlan PlanOf(const ModelSpec& spec, const MeshRun& run) {
  return PlanMemory(spec, {.dtype = DType::kF32,
                           .local_tokens = 512 * 2 / run.cp,
                           .sequences = 2,
                           .segments = run.cp > 1 ? 2 : 1,
                           .cp = run.cp,
                           .tp = run.tp,
                           .shards = run.cp,
                           .exchange = run.cp > 1 ? ExchangeMemory::kWorkspace : ExchangeMemory::kNone,
                           .recompute = run.recompute});
}

// What the plan leaves out: tiles of an attention kernel, 128 queries by 128 keys; of a scan, a chunk's
// scores with the operands of a head and their gradients, under half of this.
int64_t MostOfKernels(const ModelSpec& spec) {
  const int64_t attention = 128 * (3 * std::max<int64_t>(spec.head_dim, 10) + 2 * 128) * 4, scan = 64 << 10;
  return Uses(spec, BranchKind::kAttention) || Uses(spec, BranchKind::kLatentAttention) ? attention : scan;
}

struct MemoryCase {
  const char* pattern;
  int64_t vocab = 32;  // a larger one makes the loss the peak
  int64_t q_rank = 8;  // 0: latent attention projects its queries from the whole group's tokens
};
std::string NameOf(const ::testing::TestParamInfo<MemoryCase>& info) { return absl::StrCat(info.index); }
void PrintTo(const MemoryCase& c, std::ostream* out) { *out << c.pattern << ", vocabulary " << c.vocab; }

class Memory : public ::testing::TestWithParam<MemoryCase> {};

TEST_P(Memory, PlanIsWhatTrainingHolds) {
  ModelSpec spec = AlignedSpec(GetParam().pattern, GetParam().vocab);
  spec.latent.q_rank = GetParam().q_rank;
  const WholeBatch batch = RandomBatch(spec, {.length = 512, .batch = 2});
  for (const auto& [cp, tp] : {std::pair(1, 1), {4, 1}, {1, 2}, {2, 2}}) {
    for (const Recompute recompute :
         {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput, Recompute::kBlock}) {
      SCOPED_TRACE(::testing::Message()
                   << "policy " << static_cast<int>(recompute) << ", cp " << cp << ", tp " << tp);
      const MeshRun run{.dtype = DType::kF32, .cp = cp, .tp = tp, .recompute = recompute};
      const Held held = MeasureTraining(spec, batch, run);
      const MemoryPlan plan = PlanOf(spec, run);
      EXPECT_EQ(plan.parameters, held.parameters);
      EXPECT_EQ(plan.gradients, held.gradients);
      EXPECT_EQ(plan.optimizer, held.optimizer);
      EXPECT_EQ(plan.activations, held.saved);
      EXPECT_LE(plan.workspace, held.scratch);
      EXPECT_GE(plan.workspace + MostOfKernels(spec), held.scratch);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Plans, Memory,
    ::testing::Values(MemoryCase{"A"}, MemoryCase{"A", 512}, MemoryCase{"-"}, MemoryCase{"(A -)^2"},
                      MemoryCase{"M"}, MemoryCase{"L"}, MemoryCase{"B"}, MemoryCase{"G"}, MemoryCase{"T"},
                      MemoryCase{"T{g=2}"}, MemoryCase{"T{g=4}"}, MemoryCase{"A+- A"}, MemoryCase{"A+M+-"},
                      MemoryCase{"T+M{g=2}"}, MemoryCase{"T", 32, 0}, MemoryCase{"T+M", 32, 0},
                      MemoryCase{"T+A+-{combine=mean-norm}"}, MemoryCase{"A+M{combine=mean-norm} -"},
                      MemoryCase{"A{tie=a} M{tie=m} A{tie=a} M{tie=m}"}),
    NameOf);

// No kernel of a CPU takes bf16, but these layers allocate what they keep before they call their first
// kernel, which refuses: what would be kept on a GPU, by its dtypes. The others, and temporaries: tests/gpu.
class KeptInBf16 : public ::testing::TestWithParam<const char*> {};

TEST_P(KeptInBf16, IsPlanned) {
  const ModelSpec spec = AlignedSpec(GetParam(), 32);
  for (const Recompute recompute :
       {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput, Recompute::kBlock}) {
    SCOPED_TRACE(static_cast<int>(recompute));
    const ParamStore params(Device{}, DType::kBF16, BuildParamTable(spec), 1);
    const std::unique_ptr<SequenceMixer> mixer =
        MakeMixer({.spec = spec, .recompute = recompute, .params = params});
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, 512, 1), MakeLoopbackGroup(1)[0]);
    geometry.SetBatch(RandomSequences(5, 512, 2, Lengths::kFull, Documents::kNone));
    ModelStep step{.geometry = geometry};
    const Tensor x(Device{}, DType::kBF16, {step.tokens(), spec.d_model}),
        y(Device{}, DType::kBF16, {step.tokens(), spec.d_model});
    Context ctx(Device{});
    const absl::Status status = mixer->Forward(ctx, step, x.ref(), Keep::kForBackward, y.ref());
    EXPECT_TRUE(absl::StrContains(status.message(), "expected f32 or f64")) << status;

    const auto planned = [&](DType dtype) {
      MemoryInputs inputs{
          .dtype = dtype, .local_tokens = step.tokens(), .sequences = 2, .recompute = recompute};
      const int64_t streams = recompute == Recompute::kNone ? 3 : 2;  // of the layer, beside its branch
      return PlanMemory(spec, inputs).activations - streams * x.ref().bytes() / 2 * SizeOf(dtype);
    };
    EXPECT_EQ(planned(DType::kBF16), ctx.saved.high_water_bytes());
    // Some of it in f32, unless it is nothing.
    EXPECT_LE(planned(DType::kBF16), planned(DType::kF32));
    EXPECT_GE(2 * planned(DType::kBF16), planned(DType::kF32));
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, KeptInBf16, ::testing::Values("A", "-", "M", "G"),
                         [](const auto& info) { return absl::StrCat(info.index); });

// Keys and values that a later layer takes are kept, and so are the sums of their gradients.
TEST(MemoryOfLayers, KeysAndValuesForLaterLayersAreKept) {
  const ModelSpec own = AlignedSpec("A A", 32), taken = AlignedSpec("A A{kv=@-1}", 32);
  const int64_t kv = 2 * own.kv_heads * own.head_dim * 4 * 1024;
  for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
    const MeshRun run{.dtype = DType::kF32, .recompute = recompute};
    const Held held = MeasureTraining(taken, RandomBatch(taken, {.length = 512, .batch = 2}), run);
    EXPECT_EQ(PlanOf(taken, run).activations, held.saved);
    // The second layer keeps none; with kBlock neither did before.
    const int64_t more = recompute == Recompute::kNone ? 0 : 2 * kv;
    EXPECT_EQ(PlanOf(taken, run).activations, PlanOf(own, run).activations + more);
  }
}

TEST(MemoryOfLayers, BuffersThatTheExchangeKeepsAreNoTemporaries) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  const auto plan = [&](ExchangeMemory exchange) {
    return PlanMemory(
        spec, {.dtype = DType::kF32, .local_tokens = 512, .cp = 4, .shards = 4, .exchange = exchange});
  };
  const MemoryPlan none = plan(ExchangeMemory::kNone), own = plan(ExchangeMemory::kOwn),
                   shared = plan(ExchangeMemory::kWorkspace);
  EXPECT_EQ(none.exchange, 0);
  EXPECT_EQ(shared.exchange, 0);
  EXPECT_EQ(own.workspace, none.workspace);
  EXPECT_EQ(own.exchange, 512 * 6 * 2 * spec.kv_heads * spec.head_dim * 4);  // two of KV, four of gradients
  EXPECT_GE(own.total(), shared.total());
  EXPECT_EQ(own.total(), none.total() + own.exchange);
  const ModelSpec mlp = SmallSpec({Mlp()});
  EXPECT_EQ(PlanMemory(mlp, {.local_tokens = 512, .cp = 4, .exchange = ExchangeMemory::kOwn}).exchange, 0);
}

// Gradients in turns and in memory of their own, with the part of the sums that the optimizer then keeps.
TEST(MemoryOfLayers, PlanIsWhatGradientsAndOptimizerHold) {
  for (const bool tied : {false, true}) {
    ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(0), Mlp(), Attention(0), Mlp()});
    spec.tied_head = tied;
    for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns}) {
      ParamStore params(Device{}, DType::kF32, BuildParamTable(spec), 1, memory);
      Context ctx{Device{}};
      const ShardedAdamW optimizer(ctx, {}, spec, params, {MakeLoopbackGroup(1)[0]});
      const MemoryPlan plan = PlanMemory(spec, {.local_tokens = 1, .gradients = memory});
      EXPECT_EQ(plan.gradients, params.gradient_bytes());
      EXPECT_EQ(plan.optimizer, optimizer.state_bytes());
      EXPECT_EQ(plan.optimizer > 2 * params.bytes(), memory == GradientMemory::kTurns);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
