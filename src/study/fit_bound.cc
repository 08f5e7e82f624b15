#include "fit_bound.h"

#include <algorithm>

#include "annulus/train/exchange.h"
#include "annulus/train/trainer.h"

namespace annulus {
namespace {

double SecondsOf(const StepCost& cost, const std::vector<Stage>& stages) {
  double seconds = 0;
  for (const Stage& stage : stages) {
    if (stage.kind == StageKind::kCompute) seconds += stage.seconds;
    if (stage.kind != StageKind::kExchange) continue;
    seconds += cost.exchanges[static_cast<size_t>(stage.exchange)].seconds[0];
  }
  return seconds;
}

// FLOPs a second of attention at best, as TrainingFlops counts them: backward twice the forward.
double BestAttentionRate(const MachineProfile& machine) {
  double best = 0;
  for (const AttentionRate& rate : machine.attention) {
    const double flops =
        (rate.pass == Pass::kForward ? 2 : 4) * static_cast<double>(rate.head_dim + rate.v_head_dim);
    for (const RatePoint& point : rate.pairs) best = std::max(best, point.per_second * flops);
  }
  return best;
}

}  // namespace

// A rank of a cp group computes as one alone on a sequence as long as its part does, but that its queries see
// the keys of other parts besides.
absl::StatusOr<double> ComputingSeconds(const RunSpec& spec, const MachineProfile& machine) {
  const ParallelSpec& parallel = spec.parallel;
  RunSpec alone = spec;
  alone.parallel.dp = parallel.dp * parallel.cp;  // as many shards
  alone.parallel.cp = 1;
  alone.parallel.exchange.both = {};
  alone.parallel.exchange.forward = alone.parallel.exchange.backward = std::nullopt;
  alone.data.seq_len = std::max<int64_t>(1, spec.data.seq_len / parallel.cp);
  alone.optim.sequences_per_step = spec.optim.sequences_per_step * parallel.cp;
  ANNULUS_ASSIGN_OR_RETURN(const StepCost cost, CostOfStep(alone, machine, PlanEffort::kQuick));
  double seconds = 0;
  for (const LayerCost& layer : cost.layers) {
    seconds += SecondsOf(cost, layer.forward) + SecondsOf(cost, layer.backward);
  }
  seconds *= static_cast<double>(cost.micro_batches);
  for (const BucketCost& bucket : cost.buckets) seconds += bucket.update_seconds;
  if (parallel.cp == 1) return seconds;
  const double more = TrainingFlops(spec.model, spec.data.seq_len).causal -
                      TrainingFlops(spec.model, alone.data.seq_len).causal;
  const auto tokens = static_cast<double>(spec.data.seq_len * spec.optim.sequences_per_step);
  const auto ranks = static_cast<double>(parallel.dp * parallel.cp * parallel.tp);
  const double best = BestAttentionRate(machine);
  return best > 0 ? seconds + more * tokens / ranks / best : seconds;
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
