#include "fit_bound.h"

#include <algorithm>

#include "annulus/train/exchange.h"
#include "annulus/train/trainer.h"

namespace annulus {
namespace {

// Blocks of keys that are all seen may be computed on faster than a whole sequence, part of which is masked.
constexpr double kFasterInBlocks = 0.9;

struct Computing {
  double attention = 0, rest = 0;  // seconds of a step
};

// Of a rank without a cp group, on sequences of this length.
absl::StatusOr<Computing> ComputingAlone(RunSpec spec, int64_t seq_len, const MachineProfile& machine) {
  spec.parallel.dp *= spec.parallel.cp;  // as many shards
  spec.optim.sequences_per_step *= spec.parallel.cp;
  spec.parallel.cp = 1;
  spec.parallel.exchange.both = {};
  spec.parallel.exchange.forward = spec.parallel.exchange.backward = std::nullopt;
  spec.data.seq_len = std::max<int64_t>(1, seq_len);
  ANNULUS_ASSIGN_OR_RETURN(const StepCost cost, CostOfStep(spec, machine, PlanEffort::kQuick));
  Computing seconds;
  for (const LayerCost& layer : cost.layers) {
    for (const std::vector<Stage>* stages : {&layer.forward, &layer.backward}) {
      for (const Stage& stage : *stages) {
        if (stage.kind == StageKind::kCompute) seconds.rest += stage.seconds;
        if (stage.kind != StageKind::kExchange) continue;
        seconds.attention += cost.exchanges[static_cast<size_t>(stage.exchange)].seconds[0];
      }
    }
  }
  seconds.attention *= static_cast<double>(cost.micro_batches);
  seconds.rest *= static_cast<double>(cost.micro_batches);
  for (const BucketCost& bucket : cost.buckets) seconds.rest += bucket.update_seconds;
  return seconds;
}

}  // namespace

// A rank of a cp group has its share of the attention of whole sequences; all else it computes as one alone
// on sequences as long as its part is.
absl::StatusOr<double> ComputingSeconds(const RunSpec& spec, const MachineProfile& machine) {
  const int64_t cp = spec.parallel.cp;
  ANNULUS_ASSIGN_OR_RETURN(const Computing whole, ComputingAlone(spec, spec.data.seq_len, machine));
  if (cp == 1) return whole.attention + whole.rest;
  ANNULUS_ASSIGN_OR_RETURN(const Computing part, ComputingAlone(spec, spec.data.seq_len / cp, machine));
  return kFasterInBlocks * whole.attention / static_cast<double>(cp) + part.rest;
}

int64_t LeastBytes(const RunSpec& spec, const MachineProfile& machine) {
  int64_t least = 0;
  for (const bool at_home : {false, true}) {
    PlannedExchanges none;
    for (const AttentionKind& kind : AttentionKindsOf(spec.model))
      none[kind.attention] = {.buffer_bytes = 0, .expanded_at_home = at_home};
    const int64_t bytes = PlanMemory(spec, none).total() + machine.other_memory_bytes;
    least = at_home ? std::min(least, bytes) : bytes;
  }
  return least;
}

}  // namespace annulus
