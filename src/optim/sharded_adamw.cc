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

absl::Status CheckTensor(absl::string_view name, ConstTensorRef got, const Shape& shape, DType dtype) {
  if (got.shape() == shape && got.dtype() == dtype) return absl::OkStatus();
  return Invalid("checkpoint tensor ", name, ": is ", Name(got.dtype()), " ", ToString(got.shape()),
                 ", expected ", Name(dtype), " ", ToString(shape));
}

// to = the host tensor `from` of the accumulator dtype, rounded to the dtype of `to`.
absl::Status CopyRounded(Context& ctx, ConstTensorRef from, TensorRef to) {
  if (from.dtype() == to.dtype()) {
    Upload(ctx, from.raw(), from.bytes(), to);
    return absl::OkStatus();
  }
  const int64_t elements = to.elements(), size = SizeOf(from.dtype());
  const int64_t piece = std::min(elements, kStatePieceBytes / size);
  const TensorRef flat = to.Reshaped({elements});
  ArenaScope scope(ctx.scratch);
  const TensorRef wide = ctx.scratch.Allocate(from.dtype(), {piece});
  for (int64_t begin = 0; begin < elements; begin += piece) {
    const int64_t end = std::min(begin + piece, elements);
    const TensorRef values = wide.Rows(0, end - begin);
    Upload(ctx, static_cast<const char*>(from.raw()) + begin * size, values.bytes(), values);
    ANNULUS_RETURN_IF_ERROR(Cast(ctx, values, flat.Rows(begin, end)));
  }
  return absl::OkStatus();
}

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

absl::Status RestoreParameters(Context& ctx, ParamStore& params, const TensorFinder& find) {
  for (size_t i = 0; i < params.table().params.size(); ++i) {
    const ParamInfo& info = params.table().params[i];
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef value, find(info.name));
    ANNULUS_RETURN_IF_ERROR(CheckTensor(info.name, value, info.shape, AccumOf(params.dtype())));
    ANNULUS_RETURN_IF_ERROR(CopyRounded(ctx, value, params.Value(static_cast<int>(i))));
  }
  return absl::OkStatus();
}

ShardedAdamW::ShardedAdamW(Context& ctx, const OptimSpec& spec, ParamStore& params, Communicator group)
    : ctx_(ctx), spec_(spec), params_(params), group_(std::move(group)) {
  const DType accum = AccumOf(params.dtype());
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const TensorRef values = params.BucketValues(bucket);
    ANNULUS_CHECK(values.elements() % group_.size() == 0) << "bucket " << bucket;
    const Shape shape{values.elements() / group_.size()};
    Shard shard;
    if (!params.SharingGrads(bucket).empty()) shard.grad = Tensor(values.device(), accum, shape);
    shard.m = Tensor(values.device(), accum, shape);
    shard.v = Tensor(values.device(), accum, shape);
    if (has_master()) shard.master = Tensor(values.device(), accum, shape);
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
  for (Shard& shard : shards_) (void)shard.reduce.Wait();
  ctx_.lane.Synchronize();
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
  return has_master() ? shards_[static_cast<size_t>(bucket)].master.ref() : ValueShard(bucket);
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
    if (has_master()) ANNULUS_RETURN_IF_ERROR(Cast(ctx_, MasterShard(bucket), ValueShard(bucket)));
    ANNULUS_RETURN_IF_ERROR(StartGather(bucket));
  }
  return WaitForParameters();
}

absl::Status ShardedAdamW::PrepareGradients(int bucket) {
  for (const int other : params_.SharingGrads(bucket)) ANNULUS_RETURN_IF_ERROR(WaitForReduce(other));
  return Zero(ctx_, params_.BucketGrads(bucket));
}

absl::Status ShardedAdamW::WaitForReduce(int bucket) {
  Request& reduce = shards_[static_cast<size_t>(bucket)].reduce;
  if (reduce.done()) return absl::OkStatus();
  ctx_.waits.Begin(WaitKind::kGradients, ctx_.stream());
  absl::Status status = reduce.Wait();
  ctx_.waits.End(WaitKind::kGradients, ctx_.stream());
  return status;
}

absl::Status ShardedAdamW::StartReduce(int bucket) {
  Shard& shard = shards_[static_cast<size_t>(bucket)];
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
    if (!shard.reduce.done()) (void)shard.reduce.Test();
    if (!shard.gather.done()) (void)shard.gather.Test();
  }
}

absl::Status ShardedAdamW::FinishReduce(TensorRef sum_of_squares) {
  const TraceRange range("gradient norm");
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    ANNULUS_RETURN_IF_ERROR(WaitForReduce(bucket));
    ANNULUS_RETURN_IF_ERROR(AddSumOfSquares(ctx_, GradShard(bucket), sum_of_squares));
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
      ANNULUS_RETURN_IF_ERROR(
          AdamWUpdate(ctx_, hyper,
                      {.param = MasterShard(bucket).Rows(run.begin, run.end),
                       .m = shard.m.ref().Rows(run.begin, run.end),
                       .v = shard.v.ref().Rows(run.begin, run.end),
                       .grad = GradShard(bucket).Rows(run.begin, run.end),
                       .gradient_scale = gradient_scale,
                       .copy = has_master() ? ValueShard(bucket).Rows(run.begin, run.end) : TensorRef()}));
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

// host = the shards of all ranks one behind the other, on ranks where it is defined.
absl::Status ShardedAdamW::GatherShards(TensorRef shard, int64_t piece_bytes, TensorRef host) {
  const int64_t ranks = group_.size(), elements = shard.elements();
  const int64_t most = std::clamp<int64_t>(piece_bytes / (ranks * SizeOf(shard.dtype())), 1, elements);
  ArenaScope scope(ctx_.scratch);
  const TensorRef memory = ctx_.scratch.Allocate(shard.dtype(), {ranks * most});
  for (int64_t begin = 0; begin < elements; begin += most) {
    const int64_t end = std::min(begin + most, elements), count = end - begin;
    const TensorRef pieces = memory.Rows(0, ranks * count);
    ANNULUS_RETURN_IF_ERROR(group_.AllGather(shard.Rows(begin, end), pieces));
    if (!host.defined()) continue;
    for (int64_t r = 0; r < ranks; ++r) {
      const TensorRef to = host.Rows(r * elements + begin, r * elements + end);
      Download(ctx_, pieces.Rows(r * count, (r + 1) * count), to.raw());
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<GatheredTensors> ShardedAdamW::Gather(int64_t piece_bytes) {
  const TraceRange range("gather of the state");
  ANNULUS_RETURN_IF_ERROR(WaitForParameters());
  GatheredTensors result;
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    const Shard& shard = shards_[static_cast<size_t>(bucket)];
    const bool mine = bucket % group_.size() == group_.rank();
    for (const auto& [prefix, part] :
         {std::pair{"", MasterShard(bucket)}, std::pair{"optim.m.", shard.m.ref()},
          std::pair{"optim.v.", shard.v.ref()}}) {
      Tensor host;
      if (mine) host = Tensor(Device{}, part.dtype(), params_.BucketValues(bucket).shape());
      ANNULUS_RETURN_IF_ERROR(GatherShards(part, piece_bytes, host.ref()));
      if (!mine) continue;
      for (const ParamInfo& info : params_.table().params) {
        if (info.bucket != bucket) continue;
        const TensorRef tensor = host.ref().Rows(info.offset, info.offset + info.shape.elements());
        result.tensors.push_back({prefix + info.name, tensor.Reshaped(info.shape)});
      }
      result.memory.push_back(std::move(host));
    }
  }
  return result;
}

absl::Status ShardedAdamW::Restore(const TensorFinder& find) {
  for (size_t i = 0; i < params_.table().params.size(); ++i) {
    const ParamInfo& info = params_.table().params[i];
    const Shard& shard = shards_[static_cast<size_t>(info.bucket)];
    const Run run = RunOf(i);
    for (const auto& [prefix, state] :
         {std::pair{"", MasterShard(info.bucket)}, std::pair{"optim.m.", shard.m.ref()},
          std::pair{"optim.v.", shard.v.ref()}}) {
      const std::string name = prefix + info.name;
      ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef full, find(name));
      ANNULUS_RETURN_IF_ERROR(CheckTensor(name, full, info.shape, state.dtype()));
      if (run.begin >= run.end) continue;
      const int64_t skip = (ShardBegin(info.bucket) + run.begin - info.offset) * SizeOf(state.dtype());
      const TensorRef part = state.Rows(run.begin, run.end);
      Upload(ctx_, static_cast<const char*>(full.raw()) + skip, part.bytes(), part);
    }
  }
  return absl::OkStatus();
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
