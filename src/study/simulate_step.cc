#include "annulus/study/simulate_step.h"

#include <set>

#include "annulus/base/check.h"
#include "annulus/train/exchange.h"
#include "simulate_step_graph.h"

namespace annulus {
namespace {

MeshShape ShapeOf(const RunSpec& spec) {
  return {.dp = static_cast<int>(spec.parallel.dp),
          .cp = static_cast<int>(spec.parallel.cp),
          .tp = static_cast<int>(spec.parallel.tp)};
}

std::vector<std::string> PlansOf(const StepCost& cost) {
  std::set<std::string> plans;
  for (const ExchangePass& pass : cost.exchanges) {
    plans.insert(absl::StrCat(Name(pass.pass), ": ", pass.plan, " by ", Name(pass.transport)));
  }
  return {plans.rbegin(), plans.rend()};  // forward first
}

}  // namespace

StepFigures SimulateStep(const RunSpec& spec, const MachineProfile& machine, const StepCost& cost,
                         const Disturbance& disturbance) {
  const MeshShape shape = ShapeOf(spec);
  const Cluster::Pattern pattern =
      spec.device == DeviceChoice::kCuda ? Cluster::Pattern::kRing : Cluster::Pattern::kDirect;
  const SimulatedStep step = StepGraph(shape, machine, pattern, cost, disturbance).Simulate();
  const auto seconds = [&](Share share) { return step.seconds[static_cast<size_t>(share)]; };
  StepFigures figures{.compute_seconds = seconds(Share::kCompute),
                      .exposed_exchange_seconds = seconds(Share::kExchange),
                      .exposed_gradients_seconds = seconds(Share::kGradients),
                      .exposed_tensor_seconds = seconds(Share::kTensor),
                      .bubble_seconds = seconds(Share::kBubble),
                      .memory = cost.memory,
                      .other_memory_bytes = cost.other_memory_bytes,
                      .bytes_inside_hosts = step.sent.inside,
                      .bytes_between_hosts = step.sent.between,
                      .plans = PlansOf(cost)};
  for (const double share : step.seconds) figures.step_seconds += share;
  const auto tokens = static_cast<double>(spec.data.seq_len * spec.optim.sequences_per_step);
  figures.tokens_per_second = tokens / figures.step_seconds;
  const double per_rank = figures.tokens_per_second / shape.world() / 1e12;
  figures.tflops_causal = cost.flops.causal * per_rank;
  figures.tflops_full = cost.flops.full * per_rank;
  if (machine.peak_tflops > 0) {
    figures.mfu_causal = figures.tflops_causal / machine.peak_tflops;
    figures.mfu_full = figures.tflops_full / machine.peak_tflops;
  }
  return figures;
}

absl::StatusOr<StepFigures> PredictStep(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort,
                                        const Disturbance& disturbance) {
  const int ranks_per_host = machine.network.ranks_per_host, ranks = ShapeOf(spec).world();
  if (ranks_per_host > 0 && ranks > ranks_per_host && machine.network.links.empty()) {
    return Invalid("machine profile of ", machine.device, ": network.link: expected rates between hosts for ",
                   ranks, " ranks on hosts of ", ranks_per_host);
  }
  ANNULUS_ASSIGN_OR_RETURN(const StepCost cost, CostOfStep(spec, machine, effort));
  return SimulateStep(spec, machine, cost, disturbance);
}

}  // namespace annulus
