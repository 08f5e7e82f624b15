#include "annulus/train/trainer.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "annulus/device/gpu.h"
#include "annulus/device/trace.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/exchange.h"
#include "annulus/train/placement.h"

namespace annulus {
namespace {

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// StepReport::memory_peak_bytes of this rank.
absl::StatusOr<int64_t> MemoryInUse(Device device) {
  if (device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(const GpuMemory memory, MemoryOfGpu());
    return memory.total_bytes - memory.free_bytes;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;  // Linux reports KiB
}

// Gradients may be handed on as soon as they are complete if one micro-batch makes them. Each rank then keeps
// its share of the sums besides, which may be more than what their turns save.
GradientMemory GradientMemoryOf(const RunSpec& spec) {
  const int64_t dp = std::max<int64_t>(1, spec.parallel.dp);
  if (spec.optim.sequences_per_step / dp > spec.optim.micro_batch) return GradientMemory::kAll;
  // Of the first tensor-parallel rank: all decide alike.
  const ParamTable table =
      BuildParamTable(spec.model, {.rank = 0, .size = static_cast<int>(spec.parallel.tp)});
  const auto held = [&](GradientMemory memory) {
    return GradientElements(table, memory) + SharedGradientElements(table, memory) / (dp * spec.parallel.cp);
  };
  return held(GradientMemory::kTurns) < held(GradientMemory::kAll) ? GradientMemory::kTurns
                                                                   : GradientMemory::kAll;
}

// On GPUs the best transport is that of copy engines, as inside a host.
ExchangeMemory ExchangeMemoryOf(const RunSpec& spec) {
  if (spec.parallel.cp == 1) return ExchangeMemory::kNone;
  const TransportChoice choice = spec.parallel.exchange.transport;
  const bool best = choice == TransportChoice::kBest && spec.device == DeviceChoice::kCuda;
  return best || choice == TransportChoice::kCopyEngine ? ExchangeMemory::kOwn : ExchangeMemory::kWorkspace;
}

}  // namespace

MemoryPlan PlanMemory(const RunSpec& spec, PlannedExchanges planned) {
  const SequenceLayout layout = LayoutOf(spec);
  return PlanMemory(spec.model, {.device = DeviceKindOf(spec.device),
                                 .dtype = DTypeOf(spec.compute),
                                 .local_tokens = layout.local_rows() * spec.optim.micro_batch,
                                 .sequences = spec.optim.micro_batch,
                                 .segments = static_cast<int64_t>(layout.chunks(0).size()),
                                 .cp = spec.parallel.cp,
                                 .tp = spec.parallel.tp,
                                 .shards = spec.parallel.dp * spec.parallel.cp,
                                 .exchange = ExchangeMemoryOf(spec),
                                 .planned = std::move(planned),
                                 .recompute = spec.recompute,
                                 .gradients = GradientMemoryOf(spec)});
}

Trainer::Trainer(const RunSpec& spec, ProcessMesh& mesh, Context& ctx, ExchangeOptions exchange)
    : spec_(spec),
      mesh_(mesh),
      ctx_(ctx),
      shard_{.rank = mesh.at.tp, .size = mesh.shape.tp},
      tensor_(mesh.tp),
      params_(ctx.device, DTypeOf(spec.compute), BuildParamTable(spec.model, shard_), mesh.dp_cp.size(),
              GradientMemoryOf(spec)),
      geometry_(LayoutOf(spec), mesh.cp, std::move(exchange)),
      decoder_(spec.model, spec.recompute, params_, shard_),
      optimizer_(ctx, spec.optim, spec.model, params_, {.shards = mesh.dp_cp, .tensor = tensor_}),
      flops_(TrainingFlops(spec.model, spec.data.seq_len)),
      stats_(ctx.device, DType::kF64, {2}),
      clip_factor_(ctx.device, DType::kF64, {1}),
      stats_read_(ctx.device, 2),
      clocks_(ctx.device) {
  if (ctx.device.kind != DeviceKind::kCuda) return;
  if (const absl::StatusOr<GpuInfo> gpu = DescribeGpu(ctx.device.index); gpu.ok())
    peak_tflops_ = gpu->bf16_tflops;
}

absl::StatusOr<std::vector<ExchangeTransport*>> Trainer::SetUpExchange() {
  if (mesh_.cp.size() == 1) return std::vector<ExchangeTransport*>();
  return geometry_.Transports(ctx_);
}

absl::Status Trainer::PrepareExchange(const SequenceBatch& sequences) {
  geometry_.SetBatch(sequences);
  std::vector<AttentionCase> layers;
  for (const AttentionKind& kind : AttentionKindsOf(spec_.model))
    layers.push_back(AttentionCaseOf(spec_, kind.attention, sequences, ctx_.hopper));
  return geometry_.Prepare(ctx_, layers);
}

absl::Status Trainer::Initialize() { return optimizer_.Initialize(spec_.seed); }

TokenSlice Trainer::UploadTokens(const MicroBatch& micro) {
  const std::vector<int32_t> tokens = LocalTokens(spec_.model, params_.table(), micro.tokens);
  return {.tokens = Upload<int32_t>(ctx_, ctx_.scratch, tokens),
          .targets = Upload<int32_t>(ctx_, ctx_.scratch, micro.targets)};
}

// Adds to stats_; leaves the gradients' reduction under way.
absl::Status Trainer::ForwardBackward(const Batch& batch, double loss_scale) {
  ANNULUS_RETURN_IF_ERROR(Zero(ctx_, stats_.ref()));
  state_bytes_ = 0;
  ctx_.progress = [this] {
    optimizer_.Poll();
    tensor_.Poll(ctx_);
  };
  for (size_t i = 0; i < batch.size(); ++i) {
    const MicroBatch& micro = batch[i];
    geometry_.SetBatch(micro.sequences);
    ModelStep step{.geometry = geometry_, .clocks = &clocks_, .tensor = tensor_};
    BucketHooks hooks;
    hooks.needed = [&](int bucket) { return optimizer_.WaitForParameters(bucket); };
    if (i == 0) hooks.begun = [&](int bucket) { return optimizer_.PrepareGradients(bucket); };
    // Gradients are complete with the last micro-batch only.
    if (i + 1 == batch.size()) hooks.done = [&](int bucket) { return optimizer_.StartReduce(bucket); };
    ArenaScope scope(ctx_.scratch);
    const TokenSlice slice = UploadTokens(micro);
    ANNULUS_RETURN_IF_ERROR(
        decoder_.LossAndGradients(ctx_, step, slice, loss_scale, hooks, stats_.ref().Rows(1, 2)));
    state_bytes_ += step.state_bytes;
  }
  ctx_.progress = nullptr;
  return absl::OkStatus();
}

// On a GPU everything up to the gathering of the new parameters is enqueued before the host waits for the
// loss, so the device has work while the host prepares the next step.
absl::StatusOr<StepReport> Trainer::Step(const Batch& batch, double data_seconds) {
  const auto start = std::chrono::steady_clock::now();
  const TraceRange range(absl::StrCat("step ", step_ + 1));
  ctx_.recorder.BeginStep(step_ + 1);
  double counted = 0;
  for (const MicroBatch& micro : batch) counted += static_cast<double>(micro.counted_tokens);
  ANNULUS_ASSIGN_OR_RETURN(counted, mesh_.dp.AllReduceValue(counted, ReduceOp::kSum));
  if (counted == 0) {
    return mesh_.world.AgreeOk(Invalid("step ", step_ + 1, ": no token of the batch is counted in the loss"));
  }

  // Waits and messages of an evaluation before are not this step's.
  (void)ctx_.waits.TakeSeconds(WaitKind::kExchange);
  (void)ctx_.waits.TakeSeconds(WaitKind::kTensor);
  if (mesh_.traffic != nullptr) (void)mesh_.traffic->Take();
  ANNULUS_RETURN_IF_ERROR(ForwardBackward(batch, 1.0 / counted));
  ANNULUS_RETURN_IF_ERROR(optimizer_.FinishReduce(stats_.ref().Rows(0, 1)));
  ANNULUS_RETURN_IF_ERROR(mesh_.dp_cp.AllReduce(stats_.ref(), ReduceOp::kSum));
  // Ranks of a tensor-parallel group know the same loss, each of them its part of the gradient.
  ANNULUS_RETURN_IF_ERROR(tensor_.AllReduce(stats_.ref().Rows(0, 1)));
  ANNULUS_RETURN_IF_ERROR(ClipFactor(ctx_, stats_.ref(), spec_.optim.clip_norm, clip_factor_.ref()));
  stats_read_.Start(ctx_, stats_.ref());
  StepReport report;
  report.lr = LearningRate(spec_.optim, step_);
  ANNULUS_RETURN_IF_ERROR(optimizer_.Update(step_ + 1, report.lr, clip_factor_.ref()));

  const absl::Span<const double> stats = stats_read_.Wait();
  report.step = step_ + 1;
  report.grad_norm = std::sqrt(stats[0]);
  report.loss = stats[1] / counted;
  report.tokens = static_cast<int64_t>(counted);
  report.skipped = !std::isfinite(report.loss) || !std::isfinite(report.grad_norm);
  if (report.skipped && spec_.nan_policy == NanPolicy::kStop) {
    return mesh_.world.AgreeOk(absl::FailedPreconditionError(
        absl::StrCat("step ", report.step, ": loss=", report.loss, " grad_norm=", report.grad_norm,
                     ": expected finite values (nan_policy: STOP); parameters are as before this step")));
  }
  ++step_;
  ANNULUS_RETURN_IF_ERROR(FillTimes(SecondsSince(start) + data_seconds, data_seconds, &report));
  return report;
}

absl::Status Trainer::FillTimes(double seconds, double data_seconds, StepReport* report) {
  const double exchange = ctx_.waits.TakeSeconds(WaitKind::kExchange);
  const double reduce =
      ctx_.waits.TakeSeconds(WaitKind::kGradients) + ctx_.waits.TakeSeconds(WaitKind::kParameters);
  const double tensor = ctx_.waits.TakeSeconds(WaitKind::kTensor);
  report->attention = AttentionReports();
  std::vector<double> worst = {exchange * 1e3, reduce * 1e3, data_seconds * 1e3, tensor * 1e3,
                               static_cast<double>(state_bytes_)};
  const size_t before = worst.size();
  for (const AttentionReport& attention : report->attention) worst.push_back(attention.measured_ms);
  const Shape all = {static_cast<int64_t>(worst.size())};
  ANNULUS_RETURN_IF_ERROR(
      mesh_.world.AllReduce(TensorRef(worst.data(), DType::kF64, Device{}, all), ReduceOp::kMax));
  for (size_t i = before; i < worst.size(); ++i) report->attention[i - before].measured_ms = worst[i];
  report->throttle_gb_per_second = spec_.parallel.exchange.throttle_gb_per_second;
  report->exposed_exchange_ms = worst[0];
  report->exposed_reduce_ms = worst[1];
  report->data_ms = worst[2];
  report->exposed_tensor_ms = worst[3];
  report->state_bytes = static_cast<int64_t>(worst[4]);
  report->step_ms = seconds * 1e3;
  report->tokens_per_second = static_cast<double>(report->tokens) / seconds;
  const double per_rank = report->tokens_per_second / mesh_.world.size() / 1e12;
  report->tflops_causal = flops_.causal * per_rank;
  report->tflops_full = flops_.full * per_rank;
  report->peak_tflops = peak_tflops_;
  ANNULUS_RETURN_IF_ERROR(FillTraffic(report));
  return FillMemory(report);
}

absl::Status Trainer::FillTraffic(StepReport* report) {
  if (mesh_.traffic == nullptr) return absl::OkStatus();
  const SentTraffic own = mesh_.traffic->Take();
  int64_t sent[] = {own.inside_hosts_bytes, own.between_hosts_bytes};
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AllReduce(TensorRef(sent, DType::kI64, Device{}, {2}), ReduceOp::kSum));
  report->sent = {.inside_hosts_bytes = sent[0], .between_hosts_bytes = sent[1]};
  return absl::OkStatus();
}

MemoryPlan Trainer::MemoryHeld() const {
  return {.parameters = params_.bytes(),
          .gradients = params_.gradient_bytes(),
          .optimizer = optimizer_.state_bytes(),
          .activations = ctx_.saved.capacity_bytes(),
          .workspace = ctx_.scratch.capacity_bytes(),
          .exchange = geometry_.exchange_bytes()};
}

absl::Status Trainer::FillMemory(StepReport* report) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t in_use, MemoryInUse(ctx_.device));
  const MemoryPlan held = MemoryHeld();
  int64_t most[] = {
      held.parameters, held.gradients, held.optimizer, held.activations,
      held.workspace,  held.exchange,  in_use,         std::max<int64_t>(0, in_use - held.total())};
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AllReduce(TensorRef(most, DType::kI64, Device{}, {8}), ReduceOp::kMax));
  report->memory = {.parameters = most[0],
                    .gradients = most[1],
                    .optimizer = most[2],
                    .activations = most[3],
                    .workspace = most[4],
                    .exchange = most[5]};
  report->memory_peak_bytes = most[6];
  report->other_memory_bytes = most[7];
  return absl::OkStatus();
}

// Of this rank. The clocks' last spans are over: the loss came after them.
std::vector<AttentionReport> Trainer::AttentionReports() {
  std::vector<AttentionReport> reports;
  for (const AttentionKind& kind : AttentionKindsOf(spec_.model)) {
    const AttentionCase layer =
        AttentionCaseOf(spec_, kind.attention, geometry_.sequences(), ctx_.hopper);
    const auto branches = static_cast<double>(BranchesHere(spec_, kind.attention));
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const PlannedLayer planned = Planned(layer, pass);
      AttentionReport report = PlannedReport(planned, pass);
      report.layers = kind.attention;
      report.predicted_ms *= branches;
      const SpanClock::Spans spans = clocks_.Of(kind.attention, pass).Take();
      if (spans.count > 0)
        report.measured_ms = branches * spans.seconds * 1e3 / static_cast<double>(spans.count);
      CountExchange(planned, spans.count);
      reports.push_back(std::move(report));
    }
  }
  return reports;
}

Trainer::PlannedLayer Trainer::Planned(const AttentionCase& layer, Pass pass) const {
  const LatentDecision* decision = layer.latent ? geometry_.FindDecision(layer, pass) : nullptr;
  PlannedLayer planned{.layer = layer, .decision = decision, .exchanged = layer, .schedule = nullptr};
  if (planned.at_home()) planned.exchanged = Expanded(layer);
  planned.schedule = geometry_.FindSchedule(planned.exchanged, pass);
  return planned;
}

// What the host's transport sends, the group has counted; others go past it.
void Trainer::CountExchange(const PlannedLayer& planned, int64_t runs) {
  const AttentionGeometry::Schedule* schedule = planned.schedule;
  if (mesh_.traffic == nullptr || schedule == nullptr) return;
  if (schedule->choice.transport == TransportKind::kHost) return;
  for (const auto& [to, bytes] : BytesSentBy(mesh_.at.cp, planned.exchanged, schedule->plan)) {
    MeshCoordinates peer = mesh_.at;
    peer.cp = to;
    mesh_.traffic->Add(WorldRankOf(mesh_.shape, peer), runs * bytes);
  }
}

// What was planned for a layer, or for a branch of it.
AttentionReport Trainer::PlannedReport(const PlannedLayer& planned, Pass pass) const {
  const LatentDecision* decision = planned.decision;
  const AttentionGeometry::Schedule* schedule = planned.schedule;
  AttentionReport report{.pass = pass, .plan = {}, .why = {}};
  if (decision != nullptr) report.exchange = std::string(Name(*decision)), report.why = decision->why;
  if (schedule == nullptr) return report;
  report.plan = schedule->plan.name;
  report.kernels = schedule->kernels;
  report.transport = schedule->choice.transport;
  const std::string& why = schedule->choice.why;
  absl::StrAppend(&report.why, report.why.empty() || why.empty() ? "" : "; ", why);
  if (!schedule->choice.predicted.has_value()) return report;
  const MachineProfile& machine = geometry_.options().machine;
  const double expansion = planned.at_home() ? HomeExpansionSeconds(planned.layer, pass, machine) : 0;
  report.predicted_ms = (schedule->choice.predicted->seconds + expansion) * 1e3;
  return report;
}

absl::Status Trainer::Save(const std::string& directory, const std::string& config, uint64_t data_fingerprint,
                           int64_t keep) {
  CheckpointMeta meta{.step = step_,
                      .consumed_sequences = step_ * spec_.optim.sequences_per_step,
                      .seed = spec_.seed,
                      .data_fingerprint = data_fingerprint,
                      .model_fingerprint = Fingerprint(params_.table()),
                      .config = config};
  ANNULUS_ASSIGN_OR_RETURN(GatheredTensors gathered, optimizer_.Gather());
  return SaveCheckpoint(mesh_.world, directory, meta, std::move(gathered.tensors), keep);
}

absl::Status Trainer::CheckOrigin(const Checkpoint& checkpoint, uint64_t data_fingerprint) const {
  const CheckpointMeta& meta = checkpoint.meta();
  const std::string fingerprint = Fingerprint(params_.table());
  if (!SameParameters(meta.model_fingerprint, fingerprint)) {
    return Invalid(checkpoint.path(), ": holds another model; its parameters are\n", meta.model_fingerprint,
                   "expected those of the configured model\n", fingerprint);
  }
  if (meta.step > spec_.optim.steps) {
    return Invalid(checkpoint.path(), ": optim.steps=", spec_.optim.steps, ": expected at least ", meta.step,
                   ", the steps that the checkpoint has done");
  }
  if (meta.step == 0) return absl::OkStatus();  // nothing has been read yet: data and seed may be any
  if (meta.seed != spec_.seed) {
    return Invalid(checkpoint.path(), ": seed=", spec_.seed, ": expected ", meta.seed,
                   ", the checkpoint's, or the data would be read in another order");
  }
  if (meta.data_fingerprint != data_fingerprint) {
    return Invalid(checkpoint.path(), ": the data sources differ from those the checkpoint was trained on ",
                   "(files, splits, sequence length or packing changed); expected fingerprint ",
                   Hex64(meta.data_fingerprint), ", got ", Hex64(data_fingerprint));
  }
  if (meta.consumed_sequences != meta.step * spec_.optim.sequences_per_step) {
    return Invalid(checkpoint.path(), ": optim.sequences_per_step=", spec_.optim.sequences_per_step,
                   ": expected ", meta.consumed_sequences / std::max<int64_t>(1, meta.step),
                   ", the checkpoint's");
  }
  return absl::OkStatus();
}

absl::Status Trainer::Restore(const Checkpoint& checkpoint, uint64_t data_fingerprint) {
  absl::Status status = CheckOrigin(checkpoint, data_fingerprint);
  if (status.ok()) {
    const auto find = [&](absl::string_view name) { return checkpoint.Find(name); };
    status = Prefixed(optimizer_.Restore(find), checkpoint.path() + ": ");
  }
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AgreeOk(status));
  ANNULUS_RETURN_IF_ERROR(optimizer_.PublishParameters());
  step_ = checkpoint.meta().step;
  return absl::OkStatus();
}

}  // namespace annulus
