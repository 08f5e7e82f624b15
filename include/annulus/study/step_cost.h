#pragma once

// What a rank of a run computes and sends in one step, by the rates of a machine: the layers in the order in
// which the trainer runs them, the exchange plans that it would choose, the buckets in which gradients are
// reduced and parameters gathered. Input of the simulator (simulate_step.h).

#include <string>
#include <vector>

#include "annulus/model/cost.h"
#include "annulus/parallel/machine_profile.h"
#include "annulus/train/spec.h"

namespace annulus {

// What a stage does, in the order of the compute stream.
enum class StageKind {
  kCompute,        // kernels
  kExchange,       // an attention pass with its exchange, inside the cp group
  kStates,         // states and halos of a state-space layer, inside the cp group
  kTensorGather,   // all-gather of tokens over the tp group
  kTensorScatter,  // reduce-scatter of sums over the tp group
};
const char* Name(StageKind kind);

struct Stage {
  StageKind kind = StageKind::kCompute;
  double seconds = 0;  // kCompute: of the kernels alone, launches included
  int exchange = -1;   // kExchange: of StepCost::exchanges
  int64_t bytes = 0;   // the others: that the rank which sends most sends
  // The others: the next stage, which computes, runs meanwhile; the one behind it waits for both.
  bool overlaps_next = false;
};

// A layer, the embedding or the head with the loss, for one micro-batch.
struct LayerCost {
  std::string name;                                // "embedding", "layer 3: M", "head and loss"
  std::vector<int> buckets;                        // its parameters, of StepCost::buckets
  std::vector<Stage> forward = {}, backward = {};  // backward with what is recomputed
};

// One pass of attention of one kind of layer, with its plan as the trainer would choose it.
struct ExchangePass {
  std::string plan;
  TransportKind transport = TransportKind::kHost;
  Pass pass = Pass::kForward;
  std::vector<double> seconds = {};  // per cp rank, from the common start to its end; exposed included
  std::vector<double> exposed = {};  // of it, waiting for messages
  struct Sent {
    int from = 0, to = 0;  // cp ranks
    int64_t bytes = 0;
  };
  std::vector<Sent> sent = {};  // each pair once
};

// Parameters that are reduced and gathered together.
struct BucketCost {
  int64_t gradient_bytes = 0;   // of the whole bucket, in the dtype that is reduced
  int64_t parameter_bytes = 0;  // of the whole bucket, in the dtype that is gathered
  // Of gradient_bytes those that all ranks of a tensor-parallel group hold: summed over it before the rest.
  int64_t replicated_bytes = 0;
  double update_seconds = 0;  // AdamW on the rank's shard
};

struct StepCost {
  int64_t micro_batches = 1;
  std::vector<LayerCost> layers;  // forward order; backward runs them in reverse
  std::vector<ExchangePass> exchanges;
  std::vector<BucketCost> buckets;
  MemoryPlan memory;               // of a rank
  int64_t other_memory_bytes = 0;  // besides
  FlopsPerToken flops;
  std::string documents = {};  // what they were priced as, where they are masked
};

// How thoroughly plans of AUTO are searched.
enum class PlanEffort {
  kAll,    // as the trainer does
  kQuick,  // a few likely ones of each kind: for searches over many layouts, and for groups of hundreds
};
// kAll for groups of up to eight ranks: larger ones have too many plans to search through all of them.
PlanEffort EffortFor(int64_t cp);

// What attention is priced by where documents are masked.
enum class Documents {
  kWhole,     // as if sequences were one document each: more than it takes
  kAsInData,  // a typical micro-batch of the run's data, if they are there
};

// Ranks are placed as mpirun does by default: consecutive world ranks on a host,
// machine.network.ranks_per_host of them. spec.device and spec.compute are resolved (ResolvePlannedDevice).
// InvalidArgument where no plan can be, or the machine has no rates of what the run needs.
absl::StatusOr<StepCost> CostOfStep(const RunSpec& spec, const MachineProfile& machine,
                                    PlanEffort effort = PlanEffort::kAll,
                                    Documents documents = Documents::kWhole);

}  // namespace annulus
