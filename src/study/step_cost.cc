#include "annulus/study/step_cost.h"

#include <algorithm>
#include <map>

#include "annulus/base/check.h"
#include "annulus/train/batch.h"
#include "annulus/train/placement.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/trainer.h"
#include "step_cost_exchange.h"
#include "step_cost_times.h"

namespace annulus {

PlanEffort EffortFor(int64_t cp) {
  constexpr int64_t kMostRanksForAllPlans = 8;
  return cp > kMostRanksForAllPlans ? PlanEffort::kQuick : PlanEffort::kAll;
}

const char* Name(StageKind kind) {
  switch (kind) {
    case StageKind::kCompute:
      return "compute";
    case StageKind::kExchange:
      return "exchange";
    case StageKind::kStates:
      return "states";
    case StageKind::kTensorGather:
      return "tensor gather";
    case StageKind::kTensorScatter:
      return "tensor scatter";
  }
  return "";
}

namespace {

// Where the exchange of a class of layers stands in StepCost::exchanges.
using ExchangeIndex = std::map<std::pair<AttentionClass, Pass>, int>;

StageKind StageOf(OpKind kind) {
  switch (kind) {
    case OpKind::kAttention:
      return StageKind::kExchange;
    case OpKind::kStates:
      return StageKind::kStates;
    case OpKind::kTensorGather:
      return StageKind::kTensorGather;
    case OpKind::kTensorScatter:
      return StageKind::kTensorScatter;
    case OpKind::kProduct:
    case OpKind::kGradient:
    case OpKind::kPass:
    case OpKind::kScan:
      break;
  }
  return StageKind::kCompute;
}

// Computing in one stage, as far as nothing comes between.
absl::StatusOr<std::vector<Stage>> StagesOf(const std::vector<Op>& ops, const OpTimes& times,
                                            const ExchangeIndex& exchanges) {
  std::vector<Stage> stages;
  bool joins = false;  // the last stage is of computing that more may follow
  for (const Op& op : ops) {
    ANNULUS_RETURN_IF_ERROR(times.Check(op));
    const StageKind kind = StageOf(op.kind);
    if (kind == StageKind::kCompute) {
      const double seconds = times.SecondsOf(op);
      const bool alone = !stages.empty() && stages.back().overlaps_next;
      if (joins) {
        stages.back().seconds += seconds;
      } else {
        stages.push_back({.kind = kind, .seconds = seconds});
      }
      joins = !alone;
      continue;
    }
    joins = false;
    Stage stage{.kind = kind, .overlaps_next = op.overlaps_next};
    if (kind == StageKind::kExchange) {
      stage.exchange = exchanges.at({op.attention, op.pass});
      stages.insert(stages.end(), static_cast<size_t>(op.times), stage);
      continue;
    }
    stage.bytes = static_cast<int64_t>(op.size * op.times);
    stages.push_back(stage);
  }
  return stages;
}

// In a plan every rank computes until its last step, or waits.
ExchangePass ExchangeOf(const PlannedPass& planned) {
  const PlanCandidate& shown = planned.candidates[planned.shown];
  ExchangePass pass{.plan = shown.name, .transport = shown.transport, .pass = planned.pass};
  const Simulation& simulation = planned.simulation;
  for (size_t r = 0; r < simulation.compute.size(); ++r) {
    pass.seconds.push_back(simulation.compute[r] + simulation.exposed[r] + planned.home_seconds);
    pass.exposed.push_back(simulation.exposed[r]);
  }
  for (int from = 0; from < static_cast<int>(planned.plan.ranks.size()); ++from) {
    for (const auto& [to, bytes] : BytesSentBy(from, planned.layer, planned.plan))
      pass.sent.push_back({.from = from, .to = to, .bytes = bytes});
  }
  return pass;
}

// Between hosts NCCL alone moves what is on GPUs.
std::vector<TransportKind> TransportsOf(const RunSpec& spec, const MachineProfile& machine) {
  const int on_host = machine.network.ranks_per_host;
  const bool several = on_host > 0 && spec.parallel.cp * spec.parallel.tp > on_host;
  if (several && spec.device == DeviceChoice::kCuda) return {TransportKind::kNccl};
  return TransportsOnOneHost(spec);
}

// Rings, a ring of hosts' rings, and heads over all ranks or those of a host; of very many ranks, whose plans
// have as many steps squared, one ring at most. What is asked for by name stays as it is.
void KeepLikely(int ranks, int on_host, std::vector<PlanChoice>* plans) {
  const bool hosts = on_host > 1 && ranks > on_host;
  const bool many = ranks > kSimulateAllRanks;
  const auto likely = [&](const PlanChoice& choice) {
    if (choice.head_split > 1) {
      const bool split = choice.head_split == ranks || (hosts && choice.head_split == on_host);
      return choice.kind == PlanKind::kKvRing && split;
    }
    switch (choice.kind) {
      case PlanKind::kKvRing:
        return !many || !hosts;
      case PlanKind::kBidirectionalKvRing:
      case PlanKind::kTokenRing:
        return !many;
      case PlanKind::kDoubleRing:
        return hosts && choice.inner == on_host;
      default:
        return false;
    }
  };
  if (std::any_of(plans->begin(), plans->end(), likely))
    std::erase_if(*plans, [&](const PlanChoice& choice) { return !likely(choice); });
}

class Builder {
 public:
  Builder(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort, PricedBatch batch)
      : spec_(spec),
        machine_(machine),
        effort_(effort),
        batch_(std::move(batch)),
        shards_(spec.parallel.dp * spec.parallel.cp),
        layout_(LayoutOf(spec)),
        table_(BuildParamTable(spec.model, {.rank = 0, .size = static_cast<int>(spec.parallel.tp)})),
        times_(machine, DeviceKindOf(spec.device), DTypeOf(spec.compute)) {}

  absl::StatusOr<StepCost> Make() {
    const int64_t sequences = spec_.optim.sequences_per_step / spec_.parallel.dp;
    cost_.micro_batches = (sequences + spec_.optim.micro_batch - 1) / spec_.optim.micro_batch;
    ANNULUS_RETURN_IF_ERROR(AddExchanges());
    ANNULUS_RETURN_IF_ERROR(AddLayers());
    AddBuckets();
    cost_.other_memory_bytes = machine_.other_memory_bytes;
    cost_.documents = batch_.note;
    cost_.flops = TrainingFlops(spec_.model, spec_.data.seq_len);
    return std::move(cost_);
  }

 private:
  absl::Status AddExchanges() {
    const auto known = [&](Pass pass) {
      return std::any_of(machine_.attention.begin(), machine_.attention.end(),
                         [&](const AttentionRate& rate) { return rate.pass == pass; });
    };
    if (!known(Pass::kForward) || !known(Pass::kBackward))
      return Invalid("machine profile of ", machine_.device, ": expected rates of attention of both passes");
    ANNULUS_ASSIGN_OR_RETURN(
        const std::vector<PlannedPass> passes,
        PlanExchange(spec_, batch_.sequences, ExchangeOptionsFor(spec_, machine_, effort_)));
    for (const PlannedPass& planned : passes) {
      index_[{planned.kind.attention, planned.pass}] = static_cast<int>(cost_.exchanges.size());
      cost_.exchanges.push_back(ExchangeOf(planned));
    }
    cost_.memory = PlanMemory(spec_, PlannedExchangesOf(passes));
    return absl::OkStatus();
  }

  absl::Status AddLayer(std::string name, std::vector<int> buckets, const LayerOps& ops) {
    LayerCost layer{.name = std::move(name), .buckets = std::move(buckets), .forward = {}, .backward = {}};
    ANNULUS_ASSIGN_OR_RETURN(layer.forward, StagesOf(ops.forward, times_, index_));
    ANNULUS_ASSIGN_OR_RETURN(layer.backward, StagesOf(ops.backward, times_, index_));
    cost_.layers.push_back(std::move(layer));
    return absl::OkStatus();
  }

  absl::Status AddLayers() {
    const OpInputs inputs{.model = spec_.model,
                          .run = {.device = DeviceKindOf(spec_.device),
                                  .dtype = DTypeOf(spec_.compute),
                                  .local_tokens = layout_.local_rows() * spec_.optim.micro_batch,
                                  .sequences = spec_.optim.micro_batch,
                                  .cp = spec_.parallel.cp,
                                  .tp = spec_.parallel.tp,
                                  .recompute = spec_.recompute},
                          .layout = layout_};
    // What several layers share is needed from the first of them on, and complete after it.
    std::vector<int> first = {0};
    const int layers = static_cast<int>(spec_.model.layers.size());
    for (int bucket = layers + 2; bucket < static_cast<int>(table_.buckets.size()); ++bucket)
      first.push_back(bucket);
    ANNULUS_RETURN_IF_ERROR(AddLayer("embedding", first, EmbeddingOps(inputs)));
    for (int i = 0; i < layers; ++i) {
      const auto index = static_cast<size_t>(i);
      std::string kinds;
      for (const BranchSpec& branch : spec_.model.layers[index].branches)
        absl::StrAppend(&kinds, kinds.empty() ? "" : "+", Name(branch.kind));
      ANNULUS_RETURN_IF_ERROR(
          AddLayer(absl::StrCat("layer ", i, ": ", kinds), {i + 1}, OpsOf(inputs, index)));
    }
    return AddLayer("head and loss", {layers + 1}, HeadOps(inputs));
  }

  // Once a step: gradients are emptied, their squares summed, and parameters updated.
  void AddBuckets() {
    const DType dtype = DTypeOf(spec_.compute);
    const auto accum = static_cast<double>(SizeOf(AccumOf(dtype)));
    for (size_t b = 0; b < table_.buckets.size(); ++b) {
      const Bucket& bucket = table_.buckets[b];
      const int64_t elements = (bucket.elements + shards_ - 1) / shards_ * shards_;
      const DType held = bucket.wide ? AccumOf(dtype) : dtype;
      BucketCost cost{
          .gradient_bytes = elements * SizeOf(AccumOf(dtype)),
          .parameter_bytes = elements * SizeOf(held),
          .replicated_bytes = spec_.parallel.tp > 1 ? bucket.replicated * SizeOf(AccumOf(dtype)) : 0};
      const double shard = static_cast<double>(elements / shards_);
      const auto parameters =
          std::count_if(table_.params.begin(), table_.params.end(),
                        [&](const ParamInfo& info) { return info.bucket == static_cast<int>(b); });
      // Parameters one by one: m, v and the master copy are read and written, gradients read.
      const double calls = std::max<double>(1, static_cast<double>(parameters / shards_));
      const double updated =
          shard * (7 * accum + (bucket.wide || accum == SizeOf(dtype) ? 0 : SizeOf(dtype)));
      cost.update_seconds =
          times_.PassSeconds(PassKind::kMove, Pass::kForward, static_cast<double>(cost.gradient_bytes)) +
          times_.PassSeconds(PassKind::kMove, Pass::kForward, shard * accum) +
          calls * times_.PassSeconds(PassKind::kAdamW, Pass::kForward, updated / calls);
      cost_.buckets.push_back(cost);
    }
  }

  const RunSpec& spec_;
  const MachineProfile& machine_;
  PlanEffort effort_;
  PricedBatch batch_;
  int64_t shards_;
  SequenceLayout layout_;
  ParamTable table_;
  OpTimes times_;
  ExchangeIndex index_;
  StepCost cost_;
};

}  // namespace

ExchangeOptions ExchangeOptionsFor(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort) {
  ExchangeOptions options = ExchangeOptionsOf(spec, TransportsOf(spec, machine), machine);
  if (effort == PlanEffort::kAll) return options;
  const int on_host = options.machine.network.ranks_per_host;
  for (std::vector<PlanChoice>* plans : {&options.forward, &options.backward})
    KeepLikely(static_cast<int>(spec.parallel.cp), on_host, plans);
  options.forward_parts.clear(), options.backward_parts.clear();
  return options;
}

absl::StatusOr<StepCost> CostOfStep(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort,
                                    Documents documents) {
  PricedBatch batch = documents == Documents::kAsInData
                          ? TypicalBatch(spec)
                          : PricedBatch{.sequences = WholeSequences(spec), .note = ""};
  return Builder(spec, machine, effort, std::move(batch)).Make();
}

}  // namespace annulus
