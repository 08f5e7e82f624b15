#include <algorithm>
#include <atomic>
#include <thread>

#include "annulus/device/trace.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/adamw.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/optimizer.h"

namespace annulus {
namespace {

// InitialValues on every core: drawing billions of numbers takes minutes on one.
void FillInParallel(const ParamInfo& info, uint64_t seed, int64_t begin, TensorRef out) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t pieces = (out.elements() + kPiece - 1) / kPiece;
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      const int64_t first = piece * kPiece, last = std::min(first + kPiece, out.elements());
      InitialValues(info, seed, begin + first, out.Rows(first, last));
    }
  };
  std::vector<std::thread> helpers;
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  for (int64_t i = 1; i < std::min(cores, pieces); ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

ShardedAdamW::ShardedAdamW(Context& ctx, const OptimSpec& spec, const ModelSpec& model, ParamStore& params,
                           OptimizerGroups groups)
    : ctx_(ctx),
      spec_(spec),
      model_(model),
      params_(params),
      group_(std::move(groups.shards)),
      tensor_(std::move(groups.tensor)) {
  const DType accum = AccumOf(params.dtype());
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const TensorRef values = params.BucketValues(bucket);
    ANNULUS_CHECK(values.elements() % group_.size() == 0) << "bucket " << bucket;
    const Shape shape{values.elements() / group_.size()};
    Shard shard;
    if (!params.SharingGrads(bucket).empty()) shard.grad = Tensor(values.device(), accum, shape);
    shard.m = Tensor(values.device(), accum, shape);
    shard.v = Tensor(values.device(), accum, shape);
    if (HasMaster(bucket)) shard.master = Tensor(values.device(), accum, shape);
    shards_.push_back(std::move(shard));
  }
  for (size_t i = 0; i < params.table().params.size(); ++i) {
    const Run run = RunOf(i);
    if (run.begin < run.end) runs_.push_back(run);
  }
}

// Transfers that an error left under way still write into memory that is about to go.
ShardedAdamW::~ShardedAdamW() {
  (void)WaitForParameters();
  for (Shard& shard : shards_) {
    (void)shard.sum_of_replicated.Wait();
    (void)shard.reduce.Wait();
  }
  ctx_.lane.Synchronize();
}

bool ShardedAdamW::HasMaster(int bucket) const {
  const DType dtype = params_.BucketValues(bucket).dtype();
  return AccumOf(dtype) != dtype;
}

ShardedAdamW::Run ShardedAdamW::RunOf(size_t param) const {
  const ParamInfo& info = params_.table().params[param];
  const int64_t shard_begin = ShardBegin(info.bucket);
  const int64_t size = shards_[static_cast<size_t>(info.bucket)].m.ref().elements();
  return {.param = param,
          .bucket = info.bucket,
          .begin = std::clamp<int64_t>(info.offset - shard_begin, 0, size),
          .end = std::clamp<int64_t>(info.offset + info.shape.elements() - shard_begin, 0, size),
          .decay = info.decay};
}

int64_t ShardedAdamW::ShardBegin(int bucket) const {
  return params_.BucketValues(bucket).elements() / group_.size() * group_.rank();
}

TensorRef ShardedAdamW::ValueShard(int bucket) const {
  const TensorRef values = params_.BucketValues(bucket);
  const int64_t first = ShardBegin(bucket);
  return values.Rows(first, first + values.elements() / group_.size());
}

TensorRef ShardedAdamW::MasterShard(int bucket) const {
  return HasMaster(bucket) ? shards_[static_cast<size_t>(bucket)].master.ref() : ValueShard(bucket);
}

TensorRef ShardedAdamW::GradShard(int bucket) const {
  const TensorRef own = shards_[static_cast<size_t>(bucket)].grad.ref();
  if (own.defined()) return own;
  const TensorRef grads = params_.BucketGrads(bucket);
  const int64_t first = ShardBegin(bucket);
  return grads.Rows(first, first + grads.elements() / group_.size());
}

absl::Status ShardedAdamW::Initialize(uint64_t seed) {
  for (const Run& run : runs_) {
    const ParamInfo& info = params_.table().params[run.param];
    const TensorRef master = MasterShard(run.bucket).Rows(run.begin, run.end);
    const Tensor host(Device{}, master.dtype(), master.shape());
    FillInParallel(info, seed, ShardBegin(run.bucket) + run.begin - info.offset, host.ref());
    Upload(ctx_, host.ref().raw(), host.ref().bytes(), master);
  }
  return PublishParameters();
}

absl::Status ShardedAdamW::PublishParameters() {
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    if (HasMaster(bucket)) ANNULUS_RETURN_IF_ERROR(Cast(ctx_, MasterShard(bucket), ValueShard(bucket)));
    ANNULUS_RETURN_IF_ERROR(StartGather(bucket));
  }
  return WaitForParameters();
}

absl::Status ShardedAdamW::PrepareGradients(int bucket) {
  for (const int other : params_.SharingGrads(bucket)) ANNULUS_RETURN_IF_ERROR(WaitForReduce(other));
  return Zero(ctx_, params_.BucketGrads(bucket));
}

absl::Status ShardedAdamW::WaitForReduce(int bucket) {
  if (summing_ == bucket) ANNULUS_RETURN_IF_ERROR(FollowUp());
  Request& reduce = shards_[static_cast<size_t>(bucket)].reduce;
  if (reduce.done()) return absl::OkStatus();
  ctx_.waits.Begin(WaitKind::kGradients, ctx_.stream());
  absl::Status status = reduce.Wait();
  ctx_.waits.End(WaitKind::kGradients, ctx_.stream());
  return status;
}

// Where all tensor-parallel ranks hold some of the bucket, that is summed first. By the next call it has had
// the time of a layer, so that nobody waits for it; and all ranks of a group start in the same order.
absl::Status ShardedAdamW::StartReduce(int bucket) {
  ANNULUS_RETURN_IF_ERROR(FollowUp());
  Shard& shard = shards_[static_cast<size_t>(bucket)];
  const int64_t replicated = BucketOf(bucket).replicated;
  summing_ = bucket;
  if (tensor_.size() == 1 || replicated == 0) return FollowUp();
  Communicator tensor = tensor_.comm();
  ANNULUS_ASSIGN_OR_RETURN(
      shard.sum_of_replicated,
      tensor.IAllReduce(params_.BucketGrads(bucket).Rows(0, replicated), ReduceOp::kSum));
  return absl::OkStatus();
}

// Starts the reduction that StartReduce has put off.
absl::Status ShardedAdamW::FollowUp() {
  if (!summing_.has_value()) return absl::OkStatus();
  const int bucket = *summing_;
  Shard& shard = shards_[static_cast<size_t>(bucket)];
  summing_.reset();
  if (!shard.sum_of_replicated.done()) {
    ctx_.waits.Begin(WaitKind::kGradients, ctx_.stream());
    const absl::Status status = shard.sum_of_replicated.Wait();
    ctx_.waits.End(WaitKind::kGradients, ctx_.stream());
    ANNULUS_RETURN_IF_ERROR(status);
  }
  ANNULUS_ASSIGN_OR_RETURN(shard.reduce,
                           group_.IReduceScatter(params_.BucketGrads(bucket), GradShard(bucket)));
  return absl::OkStatus();
}

void ShardedAdamW::Poll() {
  // On a GPU completion is not a matter of polling, and a completed request could no longer be waited for in
  // the order of the stream.
  if (ctx_.device.kind != DeviceKind::kCpu) return;
  for (Shard& shard : shards_) {
    // An error shows again where the request is waited for.
    if (!shard.sum_of_replicated.done()) (void)shard.sum_of_replicated.Test();
    if (!shard.reduce.done()) (void)shard.reduce.Test();
    if (!shard.gather.done()) (void)shard.gather.Test();
  }
}

absl::Status ShardedAdamW::FinishReduce(TensorRef sum_of_squares) {
  const TraceRange range("gradient norm");
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    ANNULUS_RETURN_IF_ERROR(WaitForReduce(bucket));
    const TensorRef shard = GradShard(bucket);
    // What all ranks of the tensor-parallel group hold counts once.
    const int64_t elsewhere = tensor_.rank() == 0 ? 0 : BucketOf(bucket).replicated - ShardBegin(bucket);
    const TensorRef counted =
        shard.Rows(std::clamp<int64_t>(elsewhere, 0, shard.elements()), shard.elements());
    ANNULUS_RETURN_IF_ERROR(AddSumOfSquares(ctx_, counted, sum_of_squares));
  }
  return absl::OkStatus();
}

absl::Status ShardedAdamW::StartGather(int bucket) {
  ANNULUS_ASSIGN_OR_RETURN(shards_[static_cast<size_t>(bucket)].gather,
                           group_.IAllGather(ValueShard(bucket), params_.BucketValues(bucket)));
  return absl::OkStatus();
}

absl::Status ShardedAdamW::Update(int64_t step, double lr, ConstTensorRef gradient_scale) {
  const TraceRange range("AdamW");
  AdamWHyper hyper{.lr = lr, .beta1 = spec_.beta1, .beta2 = spec_.beta2, .eps = spec_.eps, .step = step};
  size_t next = 0;
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    Shard& shard = shards_[static_cast<size_t>(bucket)];
    for (; next < runs_.size() && runs_[next].bucket == bucket; ++next) {
      const Run& run = runs_[next];
      hyper.weight_decay = run.decay == Decay::kWeightDecay ? spec_.weight_decay : 0.0;
      ANNULUS_RETURN_IF_ERROR(AdamWUpdate(
          ctx_, hyper,
          {.param = MasterShard(bucket).Rows(run.begin, run.end),
           .m = shard.m.ref().Rows(run.begin, run.end),
           .v = shard.v.ref().Rows(run.begin, run.end),
           .grad = GradShard(bucket).Rows(run.begin, run.end),
           .gradient_scale = gradient_scale,
           .copy = HasMaster(bucket) ? ValueShard(bucket).Rows(run.begin, run.end) : TensorRef()}));
    }
    ANNULUS_RETURN_IF_ERROR(StartGather(bucket));
  }
  return absl::OkStatus();
}

absl::Status ShardedAdamW::WaitForParameters(int bucket) {
  Request& gather = shards_[static_cast<size_t>(bucket)].gather;
  if (gather.done()) return absl::OkStatus();
  ctx_.waits.Begin(WaitKind::kParameters, ctx_.stream());
  absl::Status status = gather.Wait();
  ctx_.waits.End(WaitKind::kParameters, ctx_.stream());
  return status;
}

absl::Status ShardedAdamW::WaitForParameters() {
  absl::Status status;
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) status.Update(WaitForParameters(bucket));
  return status;
}

int64_t ShardedAdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const Shard& shard : shards_) {
    for (const Tensor* part : {&shard.m, &shard.v, &shard.grad, &shard.master}) {
      if (part->ref().defined()) bytes += part->ref().bytes();
    }
  }
  return bytes;
}

}  // namespace annulus
