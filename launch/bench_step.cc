// Training steps of a configuration on random tokens: its data is not read.

#include "annulus/base/random.h"
#include "annulus/train/report.h"
#include "annulus/train/trainer.h"
#include "bench.h"

namespace annulus {
namespace {

Batch RandomBatch(const RunSpec& spec, const SequenceLayout& layout, const MeshCoordinates& at) {
  const int64_t per_rank = spec.optim.sequences_per_step / spec.parallel.dp;
  Batch batch;
  std::vector<Sequence> pending;
  for (int64_t i = 0; i < per_rank; ++i) {
    const RandomStream random(spec.seed, absl::StrCat("bench/", at.dp * per_rank + i));
    Sequence sequence;
    sequence.length = spec.data.seq_len;
    for (int64_t t = 0; t <= spec.data.seq_len; ++t) {
      const uint64_t token =
          random.Below(static_cast<uint64_t>(t), static_cast<uint64_t>(spec.model.vocab_size));
      if (t < spec.data.seq_len) sequence.tokens.push_back(static_cast<int32_t>(token));
      if (t > 0) sequence.targets.push_back(static_cast<int32_t>(token));
    }
    sequence.document_starts.resize(static_cast<size_t>(spec.data.seq_len));
    pending.push_back(std::move(sequence));
    if (static_cast<int64_t>(pending.size()) == spec.optim.micro_batch || i + 1 == per_rank) {
      batch.push_back(MakeMicroBatch(pending, spec, layout, at.cp));
      pending.clear();
    }
  }
  return batch;
}

absl::Status Run(Bench& bench) {
  ANNULUS_RETURN_IF_ERROR(PlannedMemory(bench.spec, bench.machine).status());
  Trainer trainer(bench.spec, bench.machine.mesh, bench.ctx(), bench.machine.exchange);
  ANNULUS_RETURN_IF_ERROR(trainer.Initialize());
  const Batch batch = RandomBatch(bench.spec, trainer.layout(), bench.machine.mesh.at);
  StepReport report;
  ANNULUS_ASSIGN_OR_RETURN(const double seconds, bench.Seconds([&]() -> absl::Status {
    ANNULUS_ASSIGN_OR_RETURN(report, trainer.Step(batch, 0));
    return absl::OkStatus();
  }));
  const FlopsPerToken flops = TrainingFlops(bench.spec.model, bench.spec.data.seq_len);
  const double tokens = static_cast<double>(bench.spec.optim.sequences_per_step * bench.spec.data.seq_len);
  const double per_rank = tokens / seconds / bench.machine.mesh.world.size() * 1e-12;
  nlohmann::ordered_json memory;
  for (const MemoryPlan::Part& part : report.memory.parts()) memory[part.name] = part.bytes;
  memory["other"] = report.other_memory_bytes;
  nlohmann::ordered_json result = {
      {"name", bench.spec.name},
      {"seq_len", bench.spec.data.seq_len},
      {"sequences", bench.spec.optim.sequences_per_step},
      {"transport", std::string(Name(bench.transport()))},
      {"step_ms", seconds * 1e3},
      {"tokens_per_second", tokens / seconds},
      {"tflops_causal", flops.causal * per_rank},
      {"tflops_full", flops.full * per_rank},
      {"datasheet_tflops", bench.gpu.bf16_tflops},
      {"mfu_causal", bench.gpu.bf16_tflops > 0 ? flops.causal * per_rank / bench.gpu.bf16_tflops : 0.0},
      {"exposed_exchange_ms", report.exposed_exchange_ms},
      {"exposed_reduce_ms", report.exposed_reduce_ms},
      {"memory_gib", static_cast<double>(report.memory_peak_bytes) / (int64_t{1} << 30)},
      {"memory_bytes", memory},
      {"loss", report.loss}};
  AddThrottle(bench.machine.exchange.throttle, &result);
  bench.Report(result);
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec&) {
  if (!arguments.Has("--config")) return Invalid("annulus bench step: expected --config FILE");
  return BenchRun(Run);
}

}  // namespace

BenchKind StepBench() { return {.name = "step", .options = {"--config"}, .fields = {}, .plan = Plan}; }

}  // namespace annulus
