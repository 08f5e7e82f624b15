#include "annulus/train/run.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "absl/strings/str_format.h"
#include "annulus/base/host.h"
#include "annulus/device/gpu.h"
#include "annulus/train/exchange.h"
#include "annulus/train/placement.h"
#include "annulus/train/report.h"
#include "annulus/train/sample.h"
#include "annulus/train/watchdog.h"
#include "run_directory.h"

namespace annulus {
namespace {

// A run of steps whose loss stays not finite will not recover: nothing was updated in between.
constexpr int kMaxSkippedInRow = 10;
constexpr double kSecondsBetweenEvaluationLines = 10;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string DeviceText(const Context& ctx) {
  const absl::StatusOr<GpuInfo> gpu = DescribeGpu(ctx.device.index);
  const bool on_gpu = ctx.device.kind == DeviceKind::kCuda && gpu.ok();
  return on_gpu ? absl::StrCat(ToString(ctx.device), " ", gpu->name) : ToString(ctx.device);
}

// 0 on CPUs.
int64_t GpuBytesInUse(const Context& ctx) {
  if (ctx.device.kind == DeviceKind::kCpu) return 0;
  const absl::StatusOr<GpuMemory> memory = MemoryOfGpu();
  return memory.ok() ? memory->total_bytes - memory->free_bytes : 0;
}

// The watchdog of a run, where its configuration wants one.
class Heart {
 public:
  Heart(double deadline_seconds, int world_rank) : deadline_(deadline_seconds), rank_(world_rank) {}

  // Watches these from now on, instead of those before.
  void Watch(std::vector<Communicator> groups, std::vector<ExchangeTransport*> exchanges,
             const FlightRecorder& recorder) {
    watchdog_.reset();
    if (deadline_ == 0) return;
    watchdog_.emplace(Watchdog::Options{.deadline_seconds = deadline_,
                                        .world_rank = rank_,
                                        .watched = std::move(groups),
                                        .exchanges = std::move(exchanges),
                                        .recorder = &recorder});
  }
  void Beat() {
    if (watchdog_.has_value()) watchdog_->Beat();
  }
  void Stop() { watchdog_.reset(); }

 private:
  double deadline_;
  int rank_;
  std::optional<Watchdog> watchdog_;
};

// Of this rank: it has bytes to come, or none.
enum class Sampling { kGoesOn, kEnded };

class TrainingRun {
 public:
  TrainingRun(const ResolvedConfig& config, Machine machine, RunDirectory directory,
              std::unique_ptr<DataSet> data, LineFile log, const MemoryPlan& planned, Heart& heart)
      : config_(config),
        spec_(config.spec),
        ctx_(std::move(machine.ctx)),
        mesh_(std::move(machine.mesh)),
        directory_(std::move(directory)),
        data_(std::move(data)),
        log_(std::move(log)),
        planned_(planned),
        console_(IsRoot() ? Console::Output::kPrint : Console::Output::kSilent),
        at_start_bytes_(GpuBytesInUse(*ctx_)),
        trainer_(spec_, mesh_, *ctx_, machine.exchange),
        profile_(ProfileSource(spec_.parallel.exchange, machine.exchange.machine)),
        heart_(heart) {}

  absl::Status Start(const RunOptions& options);
  absl::Status Train();

 private:
  bool IsRoot() const { return mesh_.world.rank() == 0; }
  absl::Status Resume();
  absl::StatusOr<Batch> LoadStep();
  absl::StatusOr<StepReport> OneStep();
  absl::Status Finish(const StepReport& report);
  absl::StatusOr<Evaluation> Evaluate();
  std::string HeldText(const StepReport& report) const;
  absl::Status WriteLogs(const StepReport& report, const std::string& line,
                         const std::optional<Evaluation>& evaluation);
  absl::Status Save(int64_t keep);
  absl::Status SaveBefore(const absl::Status& error);
  absl::Status PrintSample();
  absl::StatusOr<bool> StopAgreed();
  absl::Status PrintStart();
  // Rank 0 does `write`; all ranks learn whether it worked.
  template <typename Fn>
  absl::Status OnRoot(Fn&& write) {
    return mesh_.world.AgreeOk(IsRoot() ? write() : absl::OkStatus());
  }

  const ResolvedConfig& config_;
  const RunSpec& spec_;
  std::unique_ptr<Context> ctx_;
  ProcessMesh mesh_;
  RunDirectory directory_;
  std::unique_ptr<DataSet> data_;
  LineFile log_;
  const MemoryPlan planned_;
  Console console_;
  const int64_t at_start_bytes_;  // of the GPU, by CUDA and communicators
  Trainer trainer_;
  std::string profile_;  // what plans are chosen by, in words
  AttentionSummary attention_;
  Heart& heart_;
  int64_t saved_step_ = -1;
  int64_t first_step_ = 0;
  double first_time_ = 0;
  int skipped_in_row_ = 0;
};

absl::Status TrainingRun::PrintStart() {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> ranks,
                           mesh_.world.AllGatherStrings(
                               absl::StrFormat("dp=%d cp=%d tp=%d  %s  %s  pid %d", mesh_.at.dp, mesh_.at.cp,
                                               mesh_.at.tp, HostName(), DeviceText(*ctx_), getpid())));
  const FlopsPerToken flops = TrainingFlops(spec_.model, spec_.data.seq_len);
  console_.Line("resolved configuration (value, then where it comes from):\n" + config_.text);
  for (size_t i = 0; i < ranks.size(); ++i) console_.Line(absl::StrCat("rank ", i, ": ", ranks[i]));
  console_.Line(
      absl::StrFormat("model: %s parameters, %s training FLOPs per token causal, %s full",
                      FormatCount(static_cast<double>(trainer_.params().table().logical_elements())),
                      FormatCount(flops.causal), FormatCount(flops.full)));
  console_.Line(absl::StrCat("memory per rank, planned: ", MemoryText(planned_), ", total ",
                             FormatBytes(static_cast<double>(planned_.total()))));
  console_.Line(absl::StrFormat("data: %s training tokens, %s validation tokens, fingerprint %s",
                                FormatCount(static_cast<double>(data_->train_tokens())),
                                FormatCount(static_cast<double>(data_->validation_tokens())),
                                Hex64(data_->fingerprint())));
  if (mesh_.cp.size() > 1) {
    console_.Line("machine profile: " + profile_);
    if (spec_.data.document_mask)
      console_.Line("exchange plans: chosen by the documents of the first micro-batch, built anew for each");
    for (const StateKind& kind : StateKindsOf(spec_)) console_.Line("exchange of " + StateText(kind));
  }
  console_.Line("run directory: " + directory_.path);
  return absl::OkStatus();
}

absl::Status TrainingRun::Start(const RunOptions& options) {
  ANNULUS_RETURN_IF_ERROR(PrintStart());
  ANNULUS_ASSIGN_OR_RETURN(std::vector<ExchangeTransport*> exchanges, trainer_.SetUpExchange());
  heart_.Watch({mesh_.cp, mesh_.tp, mesh_.dp_cp}, std::move(exchanges), ctx_->recorder);
  if (options.start == StartFrom::kLatestCheckpoint) ANNULUS_RETURN_IF_ERROR(Resume());
  if (saved_step_ < 0) ANNULUS_RETURN_IF_ERROR(trainer_.Initialize());
  heart_.Beat();
  if (trainer_.step() < spec_.optim.steps) {
    ANNULUS_ASSIGN_OR_RETURN(const Batch first, LoadStep());
    ANNULUS_RETURN_IF_ERROR(trainer_.PrepareExchange(first.front().sequences));
    heart_.Beat();
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> devices,
                           mesh_.world.AllGatherStrings(DeviceName(ctx_->device)));
  return OnRoot([&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(directory_.Describe(config_, options, devices));
    return directory_.Event("start", trainer_.step(), CountText(mesh_.world.size(), "rank"));
  });
}

absl::Status TrainingRun::Resume() {
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(mesh_.world, directory_.checkpoints());
  if (absl::IsNotFound(checkpoint.status())) {
    console_.Line("no checkpoint yet: starting from step 0");
  } else {
    ANNULUS_RETURN_IF_ERROR(checkpoint.status());
    ANNULUS_RETURN_IF_ERROR(trainer_.Restore(*checkpoint, data_->fingerprint()));
    saved_step_ = trainer_.step();
    console_.Line(absl::StrCat("resumed from ", checkpoint->path(), " at step ", trainer_.step()));
  }
  return OnRoot([&] { return directory_.TrimMetrics(trainer_.step()); });
}

// Of the step that comes next.
absl::StatusOr<Batch> TrainingRun::LoadStep() {
  absl::StatusOr<Batch> batch =
      LoadBatch(*data_, spec_, trainer_.layout(), trainer_.step(), mesh_.at.dp, mesh_.shape.dp, mesh_.at.cp);
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AgreeOk(batch.status()));
  return batch;
}

absl::StatusOr<StepReport> TrainingRun::OneStep() {
  const double start = Now();
  NoteStep(trainer_.step() + 1);
  ANNULUS_ASSIGN_OR_RETURN(const Batch batch, LoadStep());
  ANNULUS_ASSIGN_OR_RETURN(StepReport report, trainer_.Step(batch, Now() - start));
  heart_.Beat();
  skipped_in_row_ = report.skipped ? skipped_in_row_ + 1 : 0;
  if (skipped_in_row_ >= kMaxSkippedInRow) {
    return mesh_.world.AgreeOk(absl::FailedPreconditionError(
        absl::StrCat("step ", report.step, ": loss or gradient norm not finite in ", skipped_in_row_,
                     " steps in a row (nan_policy: SKIP); the parameters were left as they were")));
  }
  return report;
}

absl::Status TrainingRun::Save(int64_t keep) {
  if (saved_step_ == trainer_.step() || keep == 0) return absl::OkStatus();
  const double start = Now();
  heart_.Beat();
  ANNULUS_RETURN_IF_ERROR(trainer_.Save(directory_.checkpoints(), config_.text, data_->fingerprint(), keep));
  heart_.Beat();
  saved_step_ = trainer_.step();
  console_.Line(absl::StrFormat("checkpoint: %s/step-%08d (%.0f ms)", directory_.checkpoints(), saved_step_,
                                (Now() - start) * 1e3));
  return OnRoot([&] { return directory_.Event("checkpoint", saved_step_, ""); });
}

// An error that all ranks agreed on before they touched anything leaves the state of the last step whole: it
// is saved, and no older checkpoint is deleted for it, since its parameters may be what went wrong.
absl::Status TrainingRun::SaveBefore(const absl::Status& error) {
  const bool wanted = spec_.checkpoint.keep > 0 && trainer_.step() != first_step_;
  if (!IsAgreed(error) || !wanted) return error;
  ANNULUS_RETURN_IF_ERROR(Save(spec_.checkpoint.keep + 1));
  return error;
}

// Everything that follows a step at its boundary: evaluation, metrics, logs.
absl::Status TrainingRun::Finish(const StepReport& report) {
  const bool last = report.step == spec_.optim.steps;
  const bool evaluate = data_->validation_sequences() > 0 &&
                        (last || (spec_.eval.every_steps > 0 && report.step % spec_.eval.every_steps == 0));
  const double done = static_cast<double>(report.step - first_step_);
  const double eta = (Now() - first_time_) / done * static_cast<double>(spec_.optim.steps - report.step);
  const std::string line = StepLine(report, spec_.optim.steps, mesh_.world.size(), eta);
  console_.Progress(report, spec_.optim.steps, line);
  if (report.step == first_step_ + 1 && mesh_.cp.size() > 1) {
    for (const std::string& plan : PlanLines(report)) console_.Line(plan);
  }
  attention_.Add(report);
  if (report.step == first_step_ + 1) console_.Line(HeldText(report));
  std::optional<Evaluation> evaluation;
  if (evaluate) {
    ANNULUS_ASSIGN_OR_RETURN(evaluation, Evaluate());
    console_.Line(absl::StrCat("step ", report.step, ": ", EvaluationText(*evaluation)));
  }
  return mesh_.world.AgreeOk(WriteLogs(report, line, evaluation));
}

// Says how far it is where it takes long, as all of a validation split may.
absl::StatusOr<Evaluation> TrainingRun::Evaluate() {
  double told = Now();
  return trainer_.Evaluate(*data_, [&](int64_t done, int64_t all) {
    heart_.Beat();
    if (Now() - told < kSecondsBetweenEvaluationLines) return;
    told = Now();
    console_.Line(absl::StrFormat("step %d: evaluated %d of %d validation sequences%s", trainer_.step(), done,
                                  all,
                                  spec_.eval.sequences > 0 ? "" : " (eval.sequences: 0 takes all of them)"));
  });
}

// With the first step everything has been allocated.
std::string TrainingRun::HeldText(const StepReport& report) const {
  std::string text = absl::StrCat("memory per rank, held: ", MemoryText(report.memory), ", other ",
                                  FormatBytes(static_cast<double>(report.other_memory_bytes)));
  if (at_start_bytes_ > 0) {
    absl::StrAppend(&text, ", of which before anything was allocated ",
                    FormatBytes(static_cast<double>(at_start_bytes_)));
  }
  return text;
}

absl::Status TrainingRun::WriteLogs(const StepReport& report, const std::string& line,
                                    const std::optional<Evaluation>& evaluation) {
  ANNULUS_RETURN_IF_ERROR(log_.Write(absl::StrCat(UtcNow("%H:%M:%S "), line, "\n")));
  if (!IsRoot()) return absl::OkStatus();
  ANNULUS_ASSIGN_OR_RETURN(LineFile metrics, LineFile::Append(directory_.path + "/metrics.jsonl"));
  return metrics.Write(MetricsJson(report, evaluation));
}

absl::StatusOr<bool> TrainingRun::StopAgreed() {
  ANNULUS_ASSIGN_OR_RETURN(const double stop,
                           mesh_.world.AllReduceValue(StopRequested() ? 1 : 0, ReduceOp::kMax));
  return stop != 0;
}

absl::Status TrainingRun::Train() {
  first_step_ = trainer_.step();
  first_time_ = Now();
  while (trainer_.step() < spec_.optim.steps) {
    const absl::StatusOr<StepReport> report = OneStep();
    if (!report.ok()) return SaveBefore(report.status());
    ANNULUS_RETURN_IF_ERROR(Finish(*report));
    ANNULUS_ASSIGN_OR_RETURN(const bool stop, StopAgreed());
    const int64_t every = spec_.checkpoint.every_steps;
    if (stop || trainer_.step() == spec_.optim.steps || (every > 0 && trainer_.step() % every == 0)) {
      ANNULUS_RETURN_IF_ERROR(Save(spec_.checkpoint.keep));
    }
    if (stop && trainer_.step() < spec_.optim.steps) {
      console_.Line(absl::StrFormat("stopped by a signal after step %d; go on with --run_dir %s --resume",
                                    trainer_.step(), directory_.path));
      return OnRoot([&] { return directory_.Event("stopped", trainer_.step(), "signal"); });
    }
  }
  for (const std::string& text : attention_.Lines()) console_.Line(text);
  ANNULUS_RETURN_IF_ERROR(PrintSample());
  console_.Line("done: " + directory_.path);
  return OnRoot([&] { return directory_.Event("done", trainer_.step(), ""); });
}

absl::Status TrainingRun::PrintSample() {
  if (spec_.sample.tokens == 0) return absl::OkStatus();
  // A tensor-parallel group has all parameters: that of rank 0 samples, and the others have nothing to do but
  // wait.
  ANNULUS_RETURN_IF_ERROR(trainer_.WaitForParameters());
  heart_.Beat();
  std::string text = spec_.sample.prompt;
  absl::Status status, met;
  // All ranks meet at each byte, so that those that wait can tell sampling from a hang.
  const auto meet = [&](Sampling sampling) {
    heart_.Beat();
    ctx_->recorder.Note("sample", absl::StrCat("after ", text.size(), " bytes"), nullptr);
    const absl::StatusOr<double> more =
        mesh_.world.AllReduceValue(sampling == Sampling::kGoesOn ? 1 : 0, ReduceOp::kMax);
    met.Update(more.status());
    return more.ok() && *more != 0;
  };
  if (mesh_.at.dp == 0 && mesh_.at.cp == 0) {
    const TrainedModel model{.spec = spec_.model,
                             .params = trainer_.params(),
                             .max_context = spec_.data.seq_len,
                             .tensor = trainer_.tensor()};
    status = Sample(*ctx_, model, spec_.sample, spec_.seed, [&](char byte) {
      text += byte;
      (void)meet(Sampling::kGoesOn);
    });
    (void)meet(Sampling::kEnded);
  } else {
    while (meet(Sampling::kEnded)) continue;
  }
  ANNULUS_RETURN_IF_ERROR(met);
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AgreeOk(status));
  console_.Line("---- sample ----\n" + text + "\n----------------");
  return absl::OkStatus();
}

}  // namespace

absl::Status TrainRun(Communicator world, const ResolvedConfig& config, const RunOptions& options) {
  ANNULUS_ASSIGN_OR_RETURN(const Device device, PlaceRank(world, config.spec));
  // Before the directory: neither a bad path nor too little memory may leave an empty run behind.
  absl::StatusOr<std::unique_ptr<DataSet>> data =
      DataSet::Open(config.spec.data, config.spec.seed, config.spec.model.vocab_size);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(data.status()));
  FlightRecorder start_up(Device{});
  start_up.Note("start-up", "communicators and memory", nullptr);
  Heart heart(config.spec.step_deadline_seconds, world.rank());
  heart.Watch({}, {}, start_up);
  ANNULUS_ASSIGN_OR_RETURN(Machine machine, SetUpMachine(world, config.spec, device));
  ANNULUS_RETURN_IF_ERROR(machine.mesh.CountTraffic(HostName()));
  ANNULUS_ASSIGN_OR_RETURN(const MemoryPlan planned, PlannedMemory(config.spec, machine));
  ANNULUS_ASSIGN_OR_RETURN(RunDirectory directory, RunDirectory::Open(world, config, options));
  absl::StatusOr<LineFile> log =
      LineFile::Append(absl::StrFormat("%s/logs/rank-%05d.log", directory.path, world.rank()));
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(log.status()));
  TrainingRun run(config, std::move(machine), std::move(directory), *std::move(data), *std::move(log),
                  planned, heart);
  absl::Status status = run.Start(options);
  if (status.ok()) status = run.Train();
  // Before anything is torn down: that would wait for the other ranks, which know of nothing.
  if (!status.ok() && !IsAgreed(status) && options.fail_alone) options.fail_alone(status);
  heart.Stop();
  return status;
}

}  // namespace annulus
