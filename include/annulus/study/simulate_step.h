#pragma once

// A training step of a whole job on a cluster, by discrete events: every rank's stages in the order of its
// compute stream, exchanges inside cp groups, tensor-parallel collectives, the reduction of each bucket of
// gradients as soon as backward has made it, the update and the gathering of parameters into the next
// forward; transfers contend for the links of ranks and hosts.

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/study/step_cost.h"

namespace annulus {

// What disturbs ranks; all of it from `seed`.
struct Disturbance {
  uint64_t seed = 0;
  double jitter = 0;              // standard deviation of the logarithm of each stage's computing time
  double straggler_share = 0;     // of ranks
  double straggler_slowdown = 1;  // of their computing
};

// A step as a study reports it, measured or simulated. Seconds are means over ranks unless said; compute and
// what follows add up to step_seconds.
struct StepFigures {
  double step_seconds = 0;
  double compute_seconds = 0;
  double exposed_exchange_seconds = 0;
  double exposed_gradients_seconds = 0;  // reduction of gradients and gathering of parameters
  double exposed_tensor_seconds = 0;
  double bubble_seconds = 0;  // the rest: waiting for slower ranks, for data, for the host
  double tokens_per_second = 0;
  double tflops_causal = 0, tflops_full = 0;  // per rank
  double mfu_causal = 0, mfu_full = 0;        // 0: the machine's peak is not known
  MemoryPlan memory = {};                     // of the rank that has most
  int64_t other_memory_bytes = 0;
  // Sent in a step, of all ranks.
  int64_t bytes_inside_hosts = 0, bytes_between_hosts = 0;
  std::vector<std::string> plans = {};  // "forward: kv_ring by copy engine"
  std::string documents = {};           // of a prediction: StepCost::documents
  int64_t memory_bytes() const { return memory.total() + other_memory_bytes; }
};

// Deterministic. The last of a few steps, when gathering overlaps with the next forward.
StepFigures SimulateStep(const RunSpec& spec, const MachineProfile& machine, const StepCost& cost,
                         const Disturbance& disturbance = {});

// InvalidArgument where so many ranks are more than a host has, and the profile has no rates between hosts. A
// profile that does not say has at most 8 GPUs to a host, or 256 CPU ranks.
absl::Status CheckNetwork(DeviceChoice device, const MachineProfile& machine, int64_t ranks);

// CheckNetwork, CostOfStep with documents as in the data, then this.
absl::StatusOr<StepFigures> PredictStep(const RunSpec& spec, const MachineProfile& machine,
                                        PlanEffort effort = PlanEffort::kAll,
                                        const Disturbance& disturbance = {});

}  // namespace annulus
