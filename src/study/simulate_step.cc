#include "annulus/study/simulate_step.h"

#include <algorithm>
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
                      .plans = PlansOf(cost),
                      .documents = cost.documents};
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

absl::Status CheckNetwork(DeviceChoice device, const MachineProfile& machine, int64_t ranks) {
  constexpr int kMostGpus = 8, kMostCpuRanks = 256;
  const NetworkProfile& network = machine.network;
  if (!network.links.empty()) return absl::OkStatus();
  const bool said = network.ranks_per_host > 0;
  const int most = std::max(device == DeviceChoice::kCuda ? kMostGpus : kMostCpuRanks, machine.ranks);
  const int host = said ? network.ranks_per_host : most;
  if (ranks <= host) return absl::OkStatus();
  return Invalid("machine profile of ", machine.device, ": network.link: missing; expected network { ",
                 "ranks_per_host link } with rates between hosts for ", ranks, " ranks, as a host has ",
                 said ? "" : "at most ", host);
}

absl::StatusOr<StepFigures> PredictStep(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort,
                                        const Disturbance& disturbance) {
  ANNULUS_RETURN_IF_ERROR(CheckNetwork(spec.device, machine, ShapeOf(spec).world()));
  ANNULUS_ASSIGN_OR_RETURN(const StepCost cost, CostOfStep(spec, machine, effort, Documents::kAsInData));
  return SimulateStep(spec, machine, cost, disturbance);
}

}  // namespace annulus
