// What is known of plans before they are built, against the plans.

#include "annulus/parallel/plan_bound.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace annulus {
namespace {

constexpr int kRanksPerHost = 4;

MachineProfile Hosts() {
  MachineProfile machine = AssumedHopper();
  const std::vector<RatePoint> rates = {{65536, 4.88e9}, {1 << 20, 30.1e9}, {1 << 24, 44.5e9}};
  machine.network = {.ranks_per_host = kRanksPerHost,
                     .links = {{TransportKind::kNccl, rates, rates, 3e-5, 1.06}}};
  return machine;
}

AttentionCase Case(LayoutKind layout, int ranks, int64_t length, int64_t window) {
  return {.layout = SequenceLayout(layout, length, ranks),
          .sequences = {.batch = 2, .lengths = {length, length}, .document_starts = {}},
          .heads = 16,
          .kv_heads = 4,
          .head_dim = 128,
          .v_head_dim = 64,
          .window = window,
          .device = DeviceKind::kCuda,
          .dtype = DType::kBF16};
}

struct Built {
  double seconds = 0;
  double host_bytes = 0;  // that come to a host from others, in the mean
};
Built Build(const AttentionCase& layer, Pass pass, const PlanChoice& choice, const MachineProfile& machine) {
  const ExchangeProblem problem = MakeExchangeProblem(layer.layout, layer.sequences, layer.window,
                                                      layer.heads, layer.kv_heads, ChunkParts(choice));
  const absl::StatusOr<ExchangePlan> plan = BuildPlan(problem, pass, choice);
  EXPECT_TRUE(plan.ok()) << plan.status();
  const ExchangeCost cost = CostOf(layer, *plan, machine, TransportKind::kNccl, {});
  Built built{.seconds = Simulate(*plan, cost).makespan};
  for (size_t r = 0; r < plan->ranks.size(); ++r) {
    const RankPlan& rank = plan->ranks[r];
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      const Step& step = rank.steps[s];
      const bool leaves = static_cast<int>(r) / kRanksPerHost != step.peer / kRanksPerHost;
      if (step.kind != StepKind::kSend || !leaves) continue;
      const SlotSpec& slot = rank.slots[static_cast<size_t>(step.slot)];
      built.host_bytes += static_cast<double>(step.rows.rows.size()) * cost.row_bytes(slot);
    }
  }
  built.host_bytes *= static_cast<double>(kRanksPerHost) / static_cast<double>(plan->ranks.size());
  return built;
}

TEST(PlanBound, NoPlanTakesLess) {
  const MachineProfile machine = Hosts();
  int with_bytes = 0, tight = 0;
  for (const LayoutKind layout : {LayoutKind::kZigzag, LayoutKind::kContiguous, LayoutKind::kStriped}) {
    for (const int ranks : {4, 6, 8, 16}) {
      for (const int64_t length : {999, 24000}) {
        for (const int64_t window : {0, 700}) {
          const AttentionCase layer = Case(layout, ranks, length, window);
          for (const PlanChoice& choice : AllChoices(ranks, layer.heads)) {
            for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
              SCOPED_TRACE(absl::StrCat(NameOf(choice, ranks), ", ", ranks, " ranks, layout ",
                                        static_cast<int>(layout), ", ", length, " tokens, window ", window,
                                        pass == Pass::kForward ? ", forward" : ", backward"));
              const PlanBound bound = BoundOfChoice(layer, pass, choice, TransportKind::kNccl, machine);
              const Built built = Build(layer, pass, choice, machine);
              EXPECT_GT(bound.seconds, 0);
              EXPECT_LE(bound.seconds, built.seconds);
              EXPECT_LE(bound.host_bytes, built.host_bytes * (1 + 1e-9));
              with_bytes += bound.host_bytes > 0 ? 1 : 0;
              tight += bound.host_bytes > 0.5 * built.host_bytes && built.host_bytes > 0 ? 1 : 0;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(with_bytes, 100);
  EXPECT_GT(2 * tight, with_bytes);  // bounds that say something
}

// A head is not shared out.
TEST(PlanBound, RanksBeyondTheHeadsDoNotHelp) {
  const MachineProfile machine = Hosts();
  const auto bound = [&](int ranks) {
    AttentionCase layer = Case(LayoutKind::kZigzag, ranks, 24000, 0);
    layer.heads = 8;
    const PlanChoice choice{.kind = PlanKind::kKvRing, .head_split = ranks};
    const double seconds =
        BoundOfChoice(layer, Pass::kForward, choice, TransportKind::kNccl, machine).seconds;
    EXPECT_LE(seconds, Build(layer, Pass::kForward, choice, machine).seconds) << ranks;
    return seconds;
  };
  EXPECT_LT(bound(8), 0.6 * bound(4));
  EXPECT_DOUBLE_EQ(bound(16), bound(8));
}

TEST(PlanBound, RingsOfHostsMoveWhatIsNeeded) {
  const MachineProfile machine = Hosts();
  const AttentionCase layer = Case(LayoutKind::kZigzag, 8, 8000, 0);
  const PlanChoice rings{.kind = PlanKind::kDoubleRing, .inner = kRanksPerHost};
  // A host has the first and the last keys, and lacks 4000 rows, or those between, and lacks 2000.
  const double row = 2 * 4 * (128 + 64) * 2.0;
  EXPECT_EQ(BoundOfChoice(layer, Pass::kForward, rings, TransportKind::kNccl, machine).host_bytes,
            3000 * row);
}

}  // namespace
}  // namespace annulus
