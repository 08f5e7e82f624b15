// ranks: 1 2 3 4
#include "comm/exchange_execute_checks.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

TEST(MpiExchange, ComputesEveryPairOnce) { testing::CheckExecute(testing::World()); }
TEST(MpiExchange, IsRightWhateverIsLate) { testing::CheckDelays(testing::World()); }
TEST(MpiExchange, IsRightOverThrottledLinks) { testing::CheckThrottledResults(testing::World()); }
TEST(MpiExchange, SurvivesAFailingStep) { testing::CheckFailingStepByHost(testing::World()); }
TEST(MpiExchange, RefusesDifferentPlans) { testing::CheckAgreement(testing::World()); }

// Messages far beyond what MPI sends eagerly: 64 Ki rows of 16 bytes. Each rank's keys are its number, and so
// is what it adds to the gradient of all keys.
class LargeBlocks {
 public:
  explicit LargeBlocks(Pass pass) : world_(testing::World()) {
    testing::ExchangeCase small = testing::ExchangeCaseMaker(1).Make(
        world_.size(), 2, 2 * world_.size(), testing::CaseLayout::kContiguous, testing::CaseMask::kFull);
    ExchangeProblem problem = small.problem;
    problem.block_rows = kRows;
    for (size_t c = 0; c < problem.chunks.size(); ++c)
      problem.chunks[c] = {
          .owner = static_cast<int>(c), .rows = {0, kRows}, .position = problem.chunks[c].position};
    for (RowRange& keys : problem.keys) keys = {0, kRows};
    plan_ = BuildPlan(problem, pass, {}).value();
  }

  void Run() {
    ASSERT_TRUE(Validate(plan_).ok());
    ExchangeBinding binding{.slots = {}, .compute = [this](const Step& step) {
                              if (step.kind == StepKind::kAttend) Attend(step.attend);
                              if (step.kind == StepKind::kReduce) Add(step);
                              return absl::OkStatus();
                            }};
    for (const SlotSpec& slot : specs()) {
      const int64_t value = slot.payload == Payload::kKv ? world_.rank() + 1 : 0;
      memory_.emplace_back(static_cast<size_t>(kRows * kElements), slot.home ? value : -1);
      binding.slots.push_back(
          {{TensorRef(memory_.back().data(), DType::kI64, Device{}, {kRows, kElements})}});
    }
    Context ctx{Device{}};
    ExchangeStats stats;
    ASSERT_TRUE(testing::HostTransport(world_)->Execute(ctx, plan_, binding, &stats).ok());
    const int64_t all = world_.size() * (world_.size() + 1) / 2;
    EXPECT_EQ(sum_, all);
    for (size_t s = 0; s < memory_.size(); ++s) {
      if (!specs()[s].home || specs()[s].payload != Payload::kKvGrad) continue;
      EXPECT_TRUE(HoldsOnly(memory_[s], all));
    }
  }

 private:
  static constexpr int64_t kRows = int64_t{1} << 16, kElements = 2;

  const std::vector<SlotSpec>& specs() const { return plan_.ranks[static_cast<size_t>(world_.rank())].slots; }
  std::vector<int64_t>& memory(int slot) { return memory_[static_cast<size_t>(slot)]; }
  static bool HoldsOnly(const std::vector<int64_t>& values, int64_t value) {
    return std::all_of(values.begin(), values.end(), [=](int64_t each) { return each == value; });
  }

  void Attend(const annulus::Attend& attend) {
    ASSERT_EQ(attend.kv_rows.size(), 1u);
    const int64_t key = attend.kv_rows[0].block + 1;
    EXPECT_TRUE(HoldsOnly(memory(attend.kv_slot), key)) << "block " << attend.kv_rows[0].block;
    sum_ += key;
    if (attend.kv_result < 0) return;
    for (int64_t& value : memory(attend.kv_result)) {
      if (attend.kv_write == ResultWrite::kOverwrite) value = 0;
      value += world_.rank() + 1;
    }
  }
  void Add(const Step& step) {
    for (int64_t i = step.rows.rows.begin * kElements; i < step.rows.rows.end * kElements; ++i)
      memory(step.into)[static_cast<size_t>(i)] += memory(step.slot)[static_cast<size_t>(i)];
  }

  Communicator world_;
  ExchangePlan plan_;
  std::vector<std::vector<int64_t>> memory_;  // by slot
  int64_t sum_ = 0;                           // of the keys of whole blocks
};

TEST(MpiExchange, MovesLargeBlocks) {
  for (const Pass pass : testing::kPasses) LargeBlocks(pass).Run();
}

}  // namespace
}  // namespace annulus
