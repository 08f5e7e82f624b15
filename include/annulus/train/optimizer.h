#pragma once

// AdamW with its state sharded over the dp x cp group (ZeRO stage 1; Rajbhandari et al., 2020): gradients of
// a bucket are reduce-scattered as soon as they are complete, each rank updates its 1/N of every bucket, and
// the new parameters are all-gathered while the next forward begins. The state is in the accumulator dtype;
// where that is wider than a bucket's dtype (bf16), it includes the parameters themselves. A gradient that
// has memory of its own is reduced in it; others, whose memory the pass needs again, into the state. Also the
// learning-rate schedules.
//
// Of a tensor-parallel group each rank has such a sharded optimizer for what it holds. Gradients of what all
// of them hold are summed over that group first; from there on they are the same bits on all, and so are the
// parameters.

#include <functional>
#include <optional>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"
#include "annulus/model/params.h"
#include "annulus/parallel/tensor_parallel.h"
#include "annulus/train/safetensors.h"
#include "annulus/train/spec.h"

namespace annulus {

// Learning rate of optimizer step `step`, 0-based, of spec.steps.
double LearningRate(const OptimSpec& spec, int64_t step);

// Logical tensors in host memory, with that memory where they had to be gathered.
struct GatheredTensors {
  std::vector<NamedTensor> tensors;
  std::vector<Tensor> memory;
};

// State moves between host and device in pieces of at most this many bytes: a bucket may be gigabytes, for
// which a device in training has no room.
inline constexpr int64_t kStatePieceBytes = int64_t{64} << 20;

using TensorFinder = std::function<absl::StatusOr<ConstTensorRef>(absl::string_view name)>;

// Copies what the store holds of every parameter from the whole host tensors that `find` gives, which must
// have the table's logical shapes and the accumulator dtype of the store's.
absl::Status RestoreParameters(Context& ctx, ParamStore& params, const TensorFinder& find);

// The ranks that the state of one model is spread over.
struct OptimizerGroups {
  Communicator shards;         // dp x cp
  TensorParallel tensor = {};  // one rank
};

class ShardedAdamW {
 public:
  // `params` was made for `model` and this rank of groups.tensor, with a bucket multiple of
  // groups.shards.size(), and takes its memory from ctx.device; both outlive the optimizer.
  ShardedAdamW(Context& ctx, const OptimSpec& spec, const ModelSpec& model, ParamStore& params,
               OptimizerGroups groups);
  ~ShardedAdamW();

  // Fills parameters and master copies with their initial values. Collective.
  absl::Status Initialize(uint64_t seed);

  // Before the first gradient of a step is added to a bucket: waits until buckets that lay in the same memory
  // are on their way, and zeroes it.
  absl::Status PrepareGradients(int bucket);
  // Starts the sums over both groups of a bucket's gradients; returns at once. Call Poll() to move them
  // along.
  absl::Status StartReduce(int bucket);
  void Poll();
  // Waits for all sums and adds this rank's part of the global sum of squares of the gradient to
  // sum_of_squares, f64 [1]. The parts of all ranks of both groups make the whole.
  absl::Status FinishReduce(TensorRef sum_of_squares);

  // Updates this rank's shards with gradients times gradient_scale (f64 [1]; NaN: nothing changes) and starts
  // to gather the parameters. `step` is 1 for the first update.
  absl::Status Update(int64_t step, double lr, ConstTensorRef gradient_scale);
  // Before parameters of the bucket are read after an Update.
  absl::Status WaitForParameters(int bucket);
  absl::Status WaitForParameters();  // of all buckets

  // The whole parameters, "optim.m.<name>" and "optim.v.<name>" that this rank is to write into a checkpoint,
  // in the accumulator dtype; buckets are dealt to the ranks in turn. Goes through `piece_bytes` of
  // ctx.scratch, or as little as one element of every rank takes. Collective.
  absl::StatusOr<GatheredTensors> Gather(int64_t piece_bytes = kStatePieceBytes);
  // Reads this rank's part of parameters and state, as RestoreParameters does; PublishParameters must follow.
  absl::Status Restore(const TensorFinder& find);
  // Parameters of all ranks from what each holds of them. Collective.
  absl::Status PublishParameters();

  // Of this rank: master parameters, m, v, and reduced gradients that are not in place.
  int64_t state_bytes() const;

 private:
  // Elements [begin, end) of this rank's shard of a bucket that belong to one parameter.
  struct Run {
    size_t param = 0;  // index in the table
    int bucket = 0;
    int64_t begin = 0, end = 0;
    Decay decay = Decay::kNone;
  };
  struct Shard {
    Tensor m, v;
    Tensor grad;    // only where the bucket's gradients share their memory
    Tensor master;  // only where the accumulator dtype is wider than the bucket's
    Request sum_of_replicated, reduce, gather;
  };

  const Bucket& BucketOf(int bucket) const { return params_.table().buckets[static_cast<size_t>(bucket)]; }
  bool HasMaster(int bucket) const;
  int64_t ShardBegin(int bucket) const;     // first element of the bucket in this rank's shard
  TensorRef ValueShard(int bucket) const;   // this rank's part of the bucket's values
  TensorRef MasterShard(int bucket) const;  // the same in the accumulator dtype
  TensorRef GradShard(int bucket) const;    // the same of the reduced gradient
  Run RunOf(size_t param) const;            // empty if the shard holds none of the parameter
  absl::Status GatherShards(TensorRef shard, int64_t piece_bytes, TensorRef host);
  absl::Status AddWholeTensors(int bucket, const std::string& prefix, Tensor local, GatheredTensors* result);
  absl::Status FollowUp();
  absl::Status WaitForReduce(int bucket);
  absl::Status StartGather(int bucket);

  Context& ctx_;
  OptimSpec spec_;
  ModelSpec model_;
  ParamStore& params_;
  Communicator group_;
  TensorParallel tensor_;
  std::vector<Shard> shards_;
  std::vector<Run> runs_;
  std::optional<int> summing_;  // a bucket whose reduce follows its sum_of_replicated
};

}  // namespace annulus
