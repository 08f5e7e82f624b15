#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

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

}  // namespace

absl::Status RestoreParameters(ParamStore& params, const TensorFinder& find) {
  for (size_t i = 0; i < params.table().params.size(); ++i) {
    const ParamInfo& info = params.table().params[i];
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef value, find(info.name));
    ANNULUS_RETURN_IF_ERROR(CheckTensor(info.name, value, info.shape, params.dtype()));
    std::memcpy(params.Value(static_cast<int>(i)).raw(), value.raw(), static_cast<size_t>(value.bytes()));
  }
  return absl::OkStatus();
}

ShardedAdamW::ShardedAdamW(const OptimSpec& spec, ParamStore& params, Communicator group)
    : spec_(spec), params_(params), group_(std::move(group)) {
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const TensorRef values = params.BucketValues(bucket);
    ANNULUS_CHECK(values.elements() % group_.size() == 0) << "bucket " << bucket;
    const Shape shape{values.elements() / group_.size()};
    Shard shard;
    shard.grad = Tensor(values.device(), values.dtype(), shape);
    shard.m = Tensor(values.device(), values.dtype(), shape);
    shard.v = Tensor(values.device(), values.dtype(), shape);
    shards_.push_back(std::move(shard));
  }
  for (const ParamInfo& info : params.table().params) {
    const Run run = RunOf(info);
    if (run.begin < run.end) runs_.push_back(run);
  }
}

ShardedAdamW::Run ShardedAdamW::RunOf(const ParamInfo& info) const {
  const int64_t shard_begin = ShardBegin(info.bucket);
  const int64_t size = shards_[static_cast<size_t>(info.bucket)].grad.ref().elements();
  return {.bucket = info.bucket,
          .begin = std::clamp<int64_t>(info.offset - shard_begin, 0, size),
          .end = std::clamp<int64_t>(info.offset + info.shape.elements() - shard_begin, 0, size),
          .decay = info.decay};
}

ShardedAdamW::~ShardedAdamW() = default;

int64_t ShardedAdamW::ShardBegin(int bucket) const {
  return params_.BucketValues(bucket).elements() / group_.size() * group_.rank();
}

absl::Status ShardedAdamW::StartReduce(int bucket) {
  Shard& shard = shards_[static_cast<size_t>(bucket)];
  ANNULUS_ASSIGN_OR_RETURN(shard.reduce,
                           group_.IReduceScatter(params_.BucketGrads(bucket), shard.grad.ref()));
  return absl::OkStatus();
}

void ShardedAdamW::Poll() {
  for (Shard& shard : shards_) {
    // An error shows again in FinishReduce, which returns it.
    if (!shard.reduce.done()) (void)shard.reduce.Test();
  }
}

absl::Status ShardedAdamW::WaitTimed(Request& request) {
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = request.Wait();
  exposed_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return status;
}

absl::StatusOr<double> ShardedAdamW::FinishReduce(Context& ctx) {
  double sum = 0;
  for (Shard& shard : shards_) {
    ANNULUS_RETURN_IF_ERROR(WaitTimed(shard.reduce));
    ANNULUS_ASSIGN_OR_RETURN(const double squares, SumOfSquares(ctx, shard.grad.ref()));
    sum += squares;
  }
  ANNULUS_ASSIGN_OR_RETURN(sum, group_.AllReduceValue(sum, ReduceOp::kSum));
  return std::sqrt(sum);
}

absl::Status ShardedAdamW::Update(Context& ctx, int64_t step, double lr, double grad_norm) {
  AdamWHyper hyper{.lr = lr, .beta1 = spec_.beta1, .beta2 = spec_.beta2, .eps = spec_.eps, .step = step};
  if (spec_.clip_norm > 0 && grad_norm > spec_.clip_norm) hyper.gradient_scale = spec_.clip_norm / grad_norm;
  for (const Run& run : runs_) {
    Shard& shard = shards_[static_cast<size_t>(run.bucket)];
    const int64_t first = ShardBegin(run.bucket);
    hyper.weight_decay = run.decay == Decay::kWeightDecay ? spec_.weight_decay : 0.0;
    ANNULUS_RETURN_IF_ERROR(
        AdamWUpdate(ctx, hyper,
                    {.param = params_.BucketValues(run.bucket).Rows(first + run.begin, first + run.end),
                     .m = shard.m.ref().Rows(run.begin, run.end),
                     .v = shard.v.ref().Rows(run.begin, run.end),
                     .grad = shard.grad.ref().Rows(run.begin, run.end)}));
  }
  std::vector<Request> gathers;
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    const TensorRef values = params_.BucketValues(bucket);
    const int64_t first = ShardBegin(bucket), size = values.elements() / group_.size();
    ANNULUS_ASSIGN_OR_RETURN(Request request, group_.IAllGather(values.Rows(first, first + size), values));
    gathers.push_back(std::move(request));
  }
  for (Request& request : gathers) ANNULUS_RETURN_IF_ERROR(WaitTimed(request));
  return absl::OkStatus();
}

double ShardedAdamW::TakeExposedSeconds() { return std::exchange(exposed_seconds_, 0.0); }

absl::StatusOr<GatheredTensors> ShardedAdamW::Gather() {
  GatheredTensors result;
  const ParamTable& table = params_.table();
  for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
    const TensorRef values = params_.BucketValues(bucket);
    Tensor m(values.device(), values.dtype(), values.shape()),
        v(values.device(), values.dtype(), values.shape());
    const Shard& shard = shards_[static_cast<size_t>(bucket)];
    ANNULUS_RETURN_IF_ERROR(group_.AllGather(shard.m.ref(), m.ref()));
    ANNULUS_RETURN_IF_ERROR(group_.AllGather(shard.v.ref(), v.ref()));
    if (bucket % group_.size() != group_.rank()) continue;
    for (size_t i = 0; i < table.params.size(); ++i) {
      const ParamInfo& info = table.params[i];
      if (info.bucket != bucket) continue;
      const int64_t end = info.offset + info.shape.elements();
      result.tensors.push_back({info.name, params_.Value(static_cast<int>(i)).Reshaped(info.shape)});
      result.tensors.push_back({"optim.m." + info.name, m.ref().Rows(info.offset, end).Reshaped(info.shape)});
      result.tensors.push_back({"optim.v." + info.name, v.ref().Rows(info.offset, end).Reshaped(info.shape)});
    }
    result.memory.push_back(std::move(m));
    result.memory.push_back(std::move(v));
  }
  return result;
}

absl::Status ShardedAdamW::Restore(const TensorFinder& find) {
  ANNULUS_RETURN_IF_ERROR(RestoreParameters(params_, find));
  for (const ParamInfo& info : params_.table().params) {
    Shard& shard = shards_[static_cast<size_t>(info.bucket)];
    const Run run = RunOf(info);
    for (const auto& [prefix, state] :
         {std::pair{"optim.m.", shard.m.ref()}, std::pair{"optim.v.", shard.v.ref()}}) {
      const std::string name = prefix + info.name;
      ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef full, find(name));
      ANNULUS_RETURN_IF_ERROR(CheckTensor(name, full, info.shape, params_.dtype()));
      if (run.begin >= run.end) continue;
      const int64_t skip = (ShardBegin(info.bucket) + run.begin - info.offset) * SizeOf(params_.dtype());
      const TensorRef part = state.Rows(run.begin, run.end);
      std::memcpy(part.raw(), static_cast<const char*>(full.raw()) + skip, static_cast<size_t>(part.bytes()));
    }
  }
  return absl::OkStatus();
}

int64_t ShardedAdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const Shard& shard : shards_) bytes += 3 * shard.grad.ref().bytes();
  return bytes;
}

}  // namespace annulus
