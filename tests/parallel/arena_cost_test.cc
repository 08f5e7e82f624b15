// What an arena is predicted to take.

#include <gtest/gtest.h>

#include "annulus/parallel/choose_plan.h"

namespace annulus {
namespace {

AttentionCase CausalOnHopper(int ranks, int64_t length) {
  return {.layout = SequenceLayout(LayoutKind::kZigzag, length, ranks),
          .sequences = {.batch = 1, .lengths = {length}, .document_starts = {}},
          .heads = 16,
          .kv_heads = 16,
          .head_dim = 128,
          .v_head_dim = 128,
          .device = DeviceKind::kCuda,
          .dtype = DType::kBF16,
          .hopper = true};
}

ExchangePlan ArenaOf(const AttentionCase& layer, Pass pass) {
  return BuildPlan(
             MakeExchangeProblem(layer.layout, layer.sequences, layer.window, layer.heads, layer.kv_heads),
             pass, {.kind = PlanKind::kArena})
      .value();
}

// One launch computes on keys as they come where the kernel and the transport can; then it hides what a step
// that waits for all keys exposes.
TEST(ArenaCost, KeysComeDuringTheStepWhereTheyCan) {
  const AttentionCase layer = CausalOnHopper(4, 4 * 4096);
  const MachineProfile hopper = AssumedHopper();
  const auto takes = [&](const AttentionCase& of, Pass pass, const MachineProfile& machine,
                         TransportKind transport, LinkThrottle throttle = {}) {
    return CostOf(of, ArenaOf(of, pass), machine, transport, throttle).arrival_seconds != nullptr;
  };
  EXPECT_TRUE(takes(layer, Pass::kForward, hopper, TransportKind::kCopyEngine));
  EXPECT_FALSE(takes(layer, Pass::kBackward, hopper, TransportKind::kCopyEngine));
  EXPECT_FALSE(takes(layer, Pass::kForward, hopper, TransportKind::kNccl)) << "which takes multiprocessors";
  EXPECT_FALSE(takes(layer, Pass::kForward, hopper, TransportKind::kCopyEngine, {.bytes_per_second = 1e9}));
  MachineProfile other = hopper;
  other.compute_capability = 80;
  EXPECT_FALSE(takes(layer, Pass::kForward, other, TransportKind::kCopyEngine));
  AttentionCase same_bits = layer;
  same_bits.determinism = Determinism::kRequired;
  EXPECT_FALSE(takes(same_bits, Pass::kForward, hopper, TransportKind::kCopyEngine));

  const ExchangePlan plan = ArenaOf(layer, Pass::kForward);
  ExchangeCost cost = CostOf(layer, plan, hopper, TransportKind::kCopyEngine, {});
  for (int r = 0; r < 4; ++r) {
    const RankPlan& rank = plan.ranks[static_cast<size_t>(r)];
    const size_t attend = rank.steps.size() - 1;
    double arriving = 0;
    for (const int receive : rank.steps[attend].after)
      arriving += cost.arrival_seconds(r, attend, static_cast<size_t>(receive));
    EXPECT_GT(arriving, 0);
    EXPECT_LT(arriving, cost.compute_seconds(r, attend)) << "the rest is on its own keys";
  }
  const Simulation as_they_come = Simulate(plan, cost);
  cost.arrival_seconds = nullptr;
  const Simulation once_there = Simulate(plan, cost);
  for (size_t r = 0; r < 4; ++r) EXPECT_LT(as_they_come.exposed[r], 0.5 * once_there.exposed[r]) << r;
  EXPECT_LT(as_they_come.makespan, once_there.makespan);
}

}  // namespace
}  // namespace annulus
