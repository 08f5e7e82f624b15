#pragma once

// One optimizer step over a process mesh: forward and backward of this rank's micro-batches, reduction of
// loss and gradients, clipping, AdamW. The loss is the global sum over counted tokens divided by their global
// count, so it does not depend on how sequences are spread over ranks.

#include <memory>
#include <optional>
#include <string>

#include "annulus/comm/process_mesh.h"
#include "annulus/model/cost.h"
#include "annulus/model/decoder.h"
#include "annulus/train/batch.h"
#include "annulus/train/checkpoint.h"
#include "annulus/train/optimizer.h"
#include "annulus/train/spec.h"

namespace annulus {

struct StepReport {
  int64_t step = 0;      // 1-based: optimizer steps done, this one included
  double loss = 0;       // nats per counted token
  double grad_norm = 0;  // before clipping
  double lr = 0;
  int64_t tokens = 0;  // counted, over all ranks
  double step_ms = 0;
  double tokens_per_second = 0;
  double tflops_causal = 0, tflops_full = 0;  // per rank, of the model's FLOPs (model/cost.h)
  double exposed_exchange_ms = 0;             // of the rank that waited longest, as are the next two
  double exposed_reduce_ms = 0;
  double data_ms = 0;
  int64_t memory_peak_bytes = 0;  // of the largest rank, resident
  bool skipped = false;           // not finite: parameters were left as they were
};

class Trainer {
 public:
  // The spec has been validated for mesh.shape. Parameters are initialised from spec.seed.
  Trainer(const RunSpec& spec, ProcessMesh& mesh);

  // Collective over the mesh. FailedPrecondition if loss or gradient norm is not finite and the policy is to
  // stop.
  absl::StatusOr<StepReport> Step(const Batch& batch, double data_seconds);

  // Mean loss in nats per counted token over the validation split, or its first spec.eval.sequences.
  // Collective.
  absl::StatusOr<double> Evaluate(const DataSet& data);

  int64_t step() const { return step_; }  // optimizer steps done
  const SequenceLayout& layout() const { return geometry_.layout(); }
  ParamStore& params() {
    return params_;
  }  // Collective. `directory` holds the step directories, of which the newest `keep` stay.
  absl::Status Save(const std::string& directory, const std::string& config, uint64_t data_fingerprint,
                    int64_t keep);
  // InvalidArgument when the checkpoint is of another model, seed or data set.
  absl::Status Restore(const Checkpoint& checkpoint, uint64_t data_fingerprint);

 private:
  absl::StatusOr<double> ForwardBackward(const Batch& batch, double loss_scale);
  absl::Status FillTimes(double seconds, double data_seconds, StepReport* report);

  RunSpec spec_;
  ProcessMesh& mesh_;
  Context ctx_;
  ParamStore params_;
  AttentionGeometry geometry_;
  Decoder decoder_;
  ShardedAdamW optimizer_;
  FlopsPerToken flops_;
  ExchangeStats exchange_;
  int64_t step_ = 0;
};

DType DTypeOf(ComputeType compute);

// What a rank of this run holds.
MemoryPlan PlanMemory(const RunSpec& spec);
}  // namespace annulus
