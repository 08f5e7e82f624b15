#pragma once

// AdamW with its state sharded over the dp x cp group (ZeRO stage 1; Rajbhandari et al., 2020): gradients of
// a bucket are reduce-scattered as soon as they are complete, each rank updates its 1/N of every bucket, and
// the new parameters are all-gathered. Also the learning-rate schedules.

#include <functional>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"
#include "annulus/model/params.h"
#include "annulus/train/safetensors.h"
#include "annulus/train/spec.h"

namespace annulus {

// Learning rate of optimizer step `step`, 0-based, of spec.steps.
double LearningRate(const OptimSpec& spec, int64_t step);

// Logical tensors with the memory of those that had to be gathered.
struct GatheredTensors {
  std::vector<NamedTensor> tensors;
  std::vector<Tensor> memory;
};

using TensorFinder = std::function<absl::StatusOr<ConstTensorRef>(absl::string_view name)>;

// Copies every parameter from the tensors that `find` gives, which must have the table's shapes and the
// store's dtype.
absl::Status RestoreParameters(ParamStore& params, const TensorFinder& find);

class ShardedAdamW {
 public:
  // `params` was made with a bucket multiple of group.size(), and outlives the optimizer.
  ShardedAdamW(const OptimSpec& spec, ParamStore& params, Communicator group);
  ~ShardedAdamW();

  // Starts the sum over the group of a bucket's gradients; returns at once. Call Poll() to move it along.
  absl::Status StartReduce(int bucket);
  void Poll();
  // Waits for all sums and returns the global norm of the gradient (the same on every rank).
  absl::StatusOr<double> FinishReduce(Context& ctx);

  // Clips to spec.clip_norm, updates this rank's shards and gathers the parameters. `step` is 1 for the first
  // update.
  absl::Status Update(Context& ctx, int64_t step, double lr, double grad_norm);

  // Seconds that FinishReduce and Update waited for transfers since the last call.
  double TakeExposedSeconds();

  // The parameters, "optim.m.<name>" and "optim.v.<name>" that this rank is to write into a checkpoint;
  // buckets are dealt to the ranks in turn. Collective.
  absl::StatusOr<GatheredTensors> Gather();
  // Reads parameters and this rank's part of the state, as RestoreParameters does.
  absl::Status Restore(const TensorFinder& find);

  int64_t state_bytes() const;  // of this rank: m, v and the reduced gradient

 private:
  // Elements [begin, end) of this rank's shard of a bucket that belong to one parameter.
  struct Run {
    int bucket = 0;
    int64_t begin = 0, end = 0;
    Decay decay = Decay::kNone;
  };
  struct Shard {
    Tensor grad, m, v;
    Request reduce;
  };

  int64_t ShardBegin(int bucket) const;    // first element of the bucket in this rank's shard
  Run RunOf(const ParamInfo& info) const;  // empty if the shard holds none of the parameter
  absl::Status WaitTimed(Request& request);

  OptimSpec spec_;
  ParamStore& params_;
  Communicator group_;
  std::vector<Shard> shards_;
  std::vector<Run> runs_;
  double exposed_seconds_ = 0;
};

}  // namespace annulus
