#pragma once

// One optimizer step over a process mesh: forward and backward of this rank's micro-batches, reduction of
// loss and gradients, clipping, AdamW. The loss is the global sum over counted tokens divided by their global
// count, so it does not depend on how sequences are spread over ranks.

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/process_mesh.h"
#include "annulus/device/transfer.h"
#include "annulus/model/cost.h"
#include "annulus/model/decoder.h"
#include "annulus/train/batch.h"
#include "annulus/train/checkpoint.h"
#include "annulus/train/optimizer.h"
#include "annulus/train/spec.h"

namespace annulus {

// Attention with its exchange, of the layers of one class in one pass: predicted against measured. Of latent
// attention with the expansion.
struct AttentionReport {
  AttentionClass layers = {};
  Pass pass = Pass::kForward;
  std::string exchange = {};  // of latent attention: "latents", "keys and values"
  std::string plan;
  TransportKind transport = TransportKind::kHost;
  std::string kernels = {};  // of this rank's blocks: "hopper", "cuda mma, cudnn"
  std::string why;           // the plan was chosen; empty where there was nothing to choose from
  double predicted_ms = 0;   // of one layer and micro-batch; 0: not predicted
  double measured_ms = 0;    // the mean of the step, of the slowest rank
};

struct StepReport {
  int64_t step = 0;      // 1-based: optimizer steps done, this one included
  double loss = 0;       // nats per counted token
  double grad_norm = 0;  // before clipping
  double lr = 0;
  int64_t tokens = 0;  // counted, over all ranks
  double step_ms = 0;
  double tokens_per_second = 0;
  double tflops_causal = 0, tflops_full = 0;  // per rank, of the model's FLOPs (model/cost.h)
  double peak_tflops = 0;                     // of the rank's GPU, by its datasheet; 0: not known
  double exposed_exchange_ms = 0;             // of the rank that waited longest, as are the next three
  double exposed_reduce_ms = 0;
  double data_ms = 0;
  double exposed_tensor_ms = 0;          // for tokens and sums of tensor parallelism
  std::optional<SentTraffic> sent = {};  // by all ranks; nothing where the mesh does not count
  // Sent by state-space layers, states and rows before convolutions; of the rank that sent most.
  int64_t state_bytes = 0;
  // Of the largest rank. On CPUs the most that was ever resident; on GPUs what is in use on the rank's GPU
  // after the step, by other processes too: a run takes its memory there once and keeps it.
  int64_t memory_peak_bytes = 0;
  MemoryPlan memory = {};             // held, of each part on the rank that has most of it
  int64_t other_memory_bytes = 0;     // in use besides: the program, CUDA, NCCL, libraries, other processes
  bool skipped = false;               // not finite: parameters were left as they were
  double throttle_gb_per_second = 0;  // artificial rate of links; 0: none
  std::vector<AttentionReport> attention = {};
};

// Means over the counted tokens of the validation split.
struct Evaluation {
  double loss = 0;  // nats
  // Share of tokens whose target has the largest logit, alone; only with spec.eval.accuracy.
  std::optional<double> accuracy = {};
};

class Trainer {
 public:
  // The spec has been validated for mesh.shape, whose communicators are for tensors on ctx.device; both
  // outlive the trainer.
  Trainer(const RunSpec& spec, ProcessMesh& mesh, Context& ctx, ExchangeOptions exchange = {});
  // Makes the transports that plans may use, which the first step would make otherwise; none where nothing is
  // exchanged. Collective.
  absl::StatusOr<std::vector<ExchangeTransport*>> SetUpExchange();
  // Chooses the plans of all layers on sequences of the first micro-batch and takes the memory of their
  // exchange, which the first step would do otherwise. Collective.
  absl::Status PrepareExchange(const SequenceBatch& sequences);
  // Parameters from spec.seed. Collective; before anything else, unless Restore follows.
  absl::Status Initialize();

  // Collective over the mesh. FailedPrecondition if loss or gradient norm is not finite and the policy is to
  // stop.
  absl::StatusOr<StepReport> Step(const Batch& batch, double data_seconds);

  // Over the validation split, or its first spec.eval.sequences. `progress` is called after each micro-batch,
  // with the sequences of all ranks that are done by then, and all there are. Collective.
  using EvaluationProgress = std::function<void(int64_t done, int64_t all)>;
  absl::StatusOr<Evaluation> Evaluate(
      const DataSet& data, const EvaluationProgress& progress = [](int64_t, int64_t) {});

  // Before parameters are read outside of the trainer: they may still be on their way.
  absl::Status WaitForParameters() { return optimizer_.WaitForParameters(); }

  int64_t step() const { return step_; }  // optimizer steps done
  const SequenceLayout& layout() const { return geometry_.layout(); }
  ParamStore& params() { return params_; }
  const TensorParallel& tensor() const { return tensor_; }
  // Collective. `directory` holds the step directories, of which the newest `keep` stay.
  absl::Status Save(const std::string& directory, const std::string& config, uint64_t data_fingerprint,
                    int64_t keep);
  // InvalidArgument when the checkpoint is of another model, seed or data set. Collective.
  absl::Status Restore(const Checkpoint& checkpoint, uint64_t data_fingerprint);

 private:
  TokenSlice UploadTokens(const MicroBatch& micro);  // into ctx_.scratch
  absl::Status ForwardBackward(const Batch& batch, double loss_scale);
  absl::StatusOr<int64_t> CountHits(const MicroBatch& micro, const TokenSlice& slice);
  absl::Status CheckOrigin(const Checkpoint& checkpoint, uint64_t data_fingerprint) const;
  absl::Status FillTimes(double seconds, double data_seconds, StepReport* report);
  std::vector<AttentionReport> AttentionReports();
  // A pass of a layer, and what goes round in it: keys and values expanded at home, or what the layer has.
  struct PlannedLayer {
    AttentionCase layer;
    const LatentDecision* decision;  // null: no latents
    bool at_home() const { return decision != nullptr && !decision->latents; }
    AttentionCase exchanged;
    const AttentionGeometry::Schedule* schedule;  // null: none yet
  };
  PlannedLayer Planned(const AttentionCase& layer, Pass pass) const;
  AttentionReport PlannedReport(const PlannedLayer& planned, Pass pass) const;
  void CountExchange(const PlannedLayer& planned, int64_t runs);
  absl::Status FillTraffic(StepReport* report);
  absl::Status FillMemory(StepReport* report);
  MemoryPlan MemoryHeld() const;

  RunSpec spec_;
  ProcessMesh& mesh_;
  Context& ctx_;
  TensorShard shard_;
  TensorParallel tensor_;
  ParamStore params_;
  AttentionGeometry geometry_;
  Decoder decoder_;
  ShardedAdamW optimizer_;
  FlopsPerToken flops_;
  double peak_tflops_ = 0;
  Tensor stats_;         // f64 [2] of the step: sum of squares of the gradient, sum of the loss
  Tensor clip_factor_;   // f64 [1]
  Readback stats_read_;  // stats_ on the host
  AttentionClocks clocks_;
  int64_t state_bytes_ = 0;  // sent in the step
  int64_t step_ = 0;
};

// What a rank of this run will hold; `planned`: PlannedExchangesOf its plans.
MemoryPlan PlanMemory(const RunSpec& spec, PlannedExchanges planned);

}  // namespace annulus
