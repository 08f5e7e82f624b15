#include "annulus/model/cost.h"

#include <gtest/gtest.h>

#include <mutex>

#include "annulus/train/optimizer.h"
#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// What one rank really holds. Each is the same on all ranks, or the largest is taken.
struct Held {
  int64_t parameters = 0, optimizer = 0, saved = 0, scratch = 0;
};

Held MeasureTraining(const ModelSpec& spec, const WholeBatch& batch, const MeshRun& run) {
  Held held;
  std::mutex mutex;
  OnMesh(spec, batch, run, [&](RankModel& model) {
    model.LossAndGradients([](int) { return absl::OkStatus(); });
    const ShardedAdamW optimizer(model.ctx(), {}, model.params(), model.mesh().dp_cp);
    const std::lock_guard<std::mutex> lock(mutex);
    held.parameters = model.params().bytes();
    held.optimizer = optimizer.state_bytes();
    held.saved = std::max(held.saved, model.ctx().saved.high_water_bytes());
    held.scratch = std::max(held.scratch, model.ctx().scratch.high_water_bytes());
  });
  return held;
}

struct MemoryCase {
  const char* pattern;
  int64_t vocab;  // the larger one makes the loss the peak
  Recompute recompute;
  int cp;
};

std::vector<MemoryCase> MemoryCases() {
  std::vector<MemoryCase> cases;
  for (const char* pattern : {"A", "-", "(A -)^2"}) {
    for (const int64_t vocab : {32, 512}) {
      for (const Recompute recompute :
           {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput, Recompute::kBlock}) {
        for (const int cp : {1, 4}) cases.push_back({pattern, vocab, recompute, cp});
      }
    }
  }
  return cases;
}

// Sizes are multiples of the arena's alignment and fit its first block, so that the plan can be held to the
// byte.
TEST(Memory, PlanIsWhatTrainingHolds) {
  for (const MemoryCase& c : MemoryCases()) {
    SCOPED_TRACE(::testing::Message() << c.pattern << ", vocabulary " << c.vocab << ", policy "
                                      << static_cast<int>(c.recompute) << ", cp " << c.cp);
    ModelSpec spec = SmallSpec(ParsePattern(c.pattern, {}).value());
    spec.vocab_size = c.vocab;
    const WholeBatch batch = RandomBatch(spec, {.length = 512, .batch = 2});
    const Held held =
        MeasureTraining(spec, batch, {.dtype = DType::kF32, .cp = c.cp, .recompute = c.recompute});
    const MemoryPlan plan =
        PlanMemory(spec, {.dtype = DType::kF32,
                          .local_tokens = 512 * 2 / c.cp,
                          .shards = c.cp,
                          .exchange = c.cp > 1 ? ExchangeMemory::kWorkspace : ExchangeMemory::kNone,
                          .recompute = c.recompute});
    EXPECT_EQ(plan.parameters, held.parameters);
    EXPECT_EQ(plan.gradients, held.parameters);
    EXPECT_EQ(plan.optimizer, held.optimizer);
    EXPECT_EQ(plan.activations, held.saved);
    // The attention kernel's tiles of 128 queries by 128 keys, which the plan leaves out.
    const int64_t tiles = 128 * (3 * spec.head_dim + 2 * 128) * 4;
    const bool attends = c.pattern != absl::string_view("-");
    EXPECT_LE(plan.workspace, held.scratch);
    EXPECT_GE(plan.workspace + (attends ? tiles : 0), held.scratch);
  }
}

TEST(Memory, BuffersThatTheExchangeKeepsAreNoTemporaries) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  const auto plan = [&](ExchangeMemory exchange) {
    return PlanMemory(spec, {.dtype = DType::kF32, .local_tokens = 512, .shards = 4, .exchange = exchange});
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
  EXPECT_EQ(PlanMemory(mlp, {.local_tokens = 512, .exchange = ExchangeMemory::kOwn}).exchange, 0);
}

// Gradients in turns and in memory of their own, with the part of the sums that the optimizer then keeps.
TEST(Memory, PlanIsWhatGradientsAndOptimizerHold) {
  for (const bool tied : {false, true}) {
    ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(0), Mlp(), Attention(0), Mlp()});
    spec.tied_head = tied;
    for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns}) {
      ParamStore params(Device{}, DType::kF32, BuildParamTable(spec), 1, memory);
      Context ctx{Device{}};
      const ShardedAdamW optimizer(ctx, {}, params, MakeLoopbackGroup(1)[0]);
      const MemoryPlan plan = PlanMemory(spec, {.local_tokens = 1, .gradients = memory});
      EXPECT_EQ(plan.gradients, params.gradient_bytes());
      EXPECT_EQ(plan.optimizer, optimizer.state_bytes());
      EXPECT_EQ(plan.optimizer > 2 * params.bytes(), memory == GradientMemory::kTurns);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
