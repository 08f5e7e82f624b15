// ranks: 1 2 3 4
#include "comm/exchange_execute_checks.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

TEST(MpiExchange, ComputesEveryPairOnce) { testing::CheckExecute(testing::World()); }
TEST(MpiExchange, SurvivesAFailingAttend) { testing::CheckFailingAttend(testing::World()); }
TEST(MpiExchange, RefusesDifferentPlans) { testing::CheckAgreement(testing::World()); }

// Messages far beyond what MPI sends eagerly: 64 Ki rows of 16 bytes.
TEST(MpiExchange, MovesLargeBlocks) {
  Communicator world = testing::World();
  const int64_t rows = int64_t{1} << 16;
  testing::ExchangeCase small = testing::ExchangeCaseMaker(1).Make(
      world.size(), 2, 2 * world.size(), testing::CaseLayout::kContiguous, testing::CaseMask::kFull);
  ExchangeProblem problem = small.problem;
  problem.block_rows = rows;
  for (Chunk& chunk : problem.chunks) chunk.rows = {0, rows};
  for (RowRange& keys : problem.keys) keys = {0, rows};
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const ExchangePlan plan = BuildKvRing(problem, pass);
    ASSERT_TRUE(Validate(plan).ok());
    std::vector<std::vector<int64_t>> slots;
    ExchangeBinding binding;
    for (const SlotSpec& slot : plan.ranks[static_cast<size_t>(world.rank())].slots) {
      slots.emplace_back(static_cast<size_t>(2 * rows), slot.payload == Payload::kKv ? world.rank() + 1 : 0);
    }
    for (auto& slot : slots) binding.slots.emplace_back(slot.data(), DType::kI64, Device{}, Shape{rows, 2});
    int64_t sum = 0;  // of the whole blocks' values
    binding.attend = [&](const Step& step) {
      const std::vector<int64_t>& kv = slots[static_cast<size_t>(step.slot)];
      EXPECT_TRUE(std::all_of(kv.begin(), kv.end(), [&](int64_t value) { return value == step.block + 1; }));
      sum += kv[0];
      if (step.grad_slot < 0) return absl::OkStatus();
      for (int64_t& value : slots[static_cast<size_t>(step.grad_slot)]) {
        value = (step.grad_write == GradWrite::kOverwrite ? 0 : value) + world.rank() + 1;
      }
      return absl::OkStatus();
    };
    Context ctx{Device{}};
    ExchangeStats stats;
    ASSERT_TRUE(Execute(ctx, plan, world, binding, &stats).ok());
    const int64_t all = world.size() * (world.size() + 1) / 2;
    EXPECT_EQ(sum, all);
    for (size_t s = 0; s < slots.size(); ++s) {
      const SlotSpec& spec = plan.ranks[static_cast<size_t>(world.rank())].slots[s];
      if (!spec.home || spec.payload != Payload::kKvGrad) continue;
      EXPECT_TRUE(std::all_of(slots[s].begin(), slots[s].end(), [&](int64_t value) { return value == all; }));
    }
  }
}

}  // namespace
}  // namespace annulus
