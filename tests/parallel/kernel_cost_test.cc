// Which kernels' rates price the blocks of a layer.

#include <gtest/gtest.h>

#include "annulus/base/check.h"
#include "annulus/comm/exchange_build.h"
#include "annulus/comm/exchange_simulate.h"
#include "annulus/parallel/choose_plan.h"

namespace annulus {
namespace {

constexpr int64_t kRows = 4096, kHeads = 16;

// On one rank nothing but the call takes time.
double BackwardSeconds(const MachineProfile& machine, Determinism determinism) {
  const AttentionCase layer{.layout = SequenceLayout(LayoutKind::kZigzag, kRows, 1),
                            .sequences = {.batch = 1, .lengths = {kRows}, .document_starts = {}},
                            .heads = kHeads,
                            .kv_heads = kHeads,
                            .head_dim = 128,
                            .v_head_dim = 128,
                            .device = DeviceKind::kCuda,
                            .dtype = DType::kBF16,
                            .determinism = determinism};
  const absl::StatusOr<ExchangePlan> plan = BuildPlan(
      MakeExchangeProblem(layer.layout, layer.sequences, 0, kHeads, kHeads, 1), Pass::kBackward, {});
  ANNULUS_CHECK(plan.ok()) << plan.status();
  return Simulate(*plan, CostOf(layer, *plan, machine, TransportKind::kHost, {})).makespan;
}

AttentionRate RateOf(AttentionKernel kernel, Determinism determinism, double flops_per_second) {
  return {.kernel = kernel,
          .pass = Pass::kBackward,
          .shape = MaskShape::kFull,
          .head_dim = 128,
          .v_head_dim = 128,
          .determinism = determinism,
          .pairs = {{1, flops_per_second / 1280}}};
}

// Whatever this program has; and sums in a fixed order have their own.
TEST(KernelCost, IsOfTheKernelsThatTheProfileKnows) {
  MachineProfile machine{
      .device = "even", .ranks = 1, .attention = {}, .links = {}, .copy = {{1, 1e30}}, .launch_seconds = 0};
  const std::vector<RatePoint> any = {{1, 1}};
  machine.links = {{TransportKind::kHost, any, any, 0, 1}};
  machine.attention = {RateOf(AttentionKernel::kCudnn, Determinism::kOff, 1e12)};
  const double flops = static_cast<double>(kRows * (kRows + 1) / 2 * kHeads * 1280);
  EXPECT_NEAR(BackwardSeconds(machine, Determinism::kOff), flops / 1e12, 1e-9 * flops / 1e12);

  machine.attention.push_back(RateOf(AttentionKernel::kHopper, Determinism::kRequired, 0.5e12));
  machine.attention.push_back(RateOf(AttentionKernel::kHopper, Determinism::kOff, 2e12));
  const double any_order = BackwardSeconds(machine, Determinism::kOff);
  // Tiles across the diagonal are computed whole.
  EXPECT_GT(any_order, flops / 2e12);
  EXPECT_LT(any_order, 1.05 * flops / 2e12);
  EXPECT_NEAR(BackwardSeconds(machine, Determinism::kRequired), 4 * any_order, 1e-9 * any_order);
}

}  // namespace
}  // namespace annulus
