#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
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

const char* At(ConstTensorRef host, int64_t element) {
  return static_cast<const char*>(host.raw()) + element * SizeOf(host.dtype());
}
// to[at, at + elements) = from[from_at, ...), on hosts and of one dtype.
void CopyElements(ConstTensorRef from, int64_t from_at, TensorRef to, int64_t at, int64_t elements) {
  const int64_t size = SizeOf(to.dtype());
  std::memcpy(static_cast<char*>(to.raw()) + at * size, At(from, from_at),
              static_cast<size_t>(elements * size));
}

// Values on the host: somebody else's or their own.
struct HostValues {
  ConstTensorRef ref;
  Tensor memory;
};

// Local elements [begin, end) of a parameter out of the whole of it, whose data may be unaligned.
HostValues LocalValues(const ParamInfo& info, ConstTensorRef whole, int64_t begin, int64_t end) {
  const std::vector<LogicalRun> runs = LogicalRuns(info, begin, end);
  const Shape shape{end - begin};
  if (runs.size() == 1)
    return {.ref = {At(whole, runs[0].logical), whole.dtype(), Device{}, shape}, .memory = {}};
  HostValues values{.ref = {}, .memory = Tensor(Device{}, whole.dtype(), shape)};
  values.ref = values.memory.ref();
  for (const LogicalRun& run : runs) {
    CopyElements(whole, run.logical, values.memory.ref(), run.local - begin, run.elements);
  }
  return values;
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
    Upload(ctx, At(from, begin), values.bytes(), values);
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
    ANNULUS_RETURN_IF_ERROR(CheckTensor(info.name, value, info.logical, AccumOf(params.dtype())));
    if (info.shape.elements() == 0) continue;  // on other ranks
    const HostValues local = LocalValues(info, value, 0, info.shape.elements());
    ANNULUS_RETURN_IF_ERROR(CopyRounded(ctx, local.ref, params.Value(static_cast<int>(i))));
  }
  return absl::OkStatus();
}

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

// host = the shards of all ranks one behind the other, on ranks where it is defined.
absl::Status ShardedAdamW::GatherShards(TensorRef shard, int64_t piece_bytes, TensorRef host) {
  const int64_t ranks = group_.size(), elements = shard.elements();
  const int64_t most =
      std::max<int64_t>(1, std::min(piece_bytes / (ranks * SizeOf(shard.dtype())), elements));
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

// Adds the bucket's whole tensors to those of one rank of the tensor-parallel group, to which the others send
// what they hold. local: this rank's elements of the bucket.
absl::Status ShardedAdamW::AddWholeTensors(int bucket, const std::string& prefix, Tensor local,
                                           GatheredTensors* result) {
  const auto params_of = [&](const ParamTable& table) {
    std::vector<const ParamInfo*> infos;
    for (const ParamInfo& info : table.params) {
      if (info.bucket == bucket) infos.push_back(&info);
    }
    return infos;
  };
  if (tensor_.size() == 1) {
    for (const ParamInfo* info : params_of(params_.table())) {
      const TensorRef tensor = local.ref().Rows(info->offset, info->offset + info->shape.elements());
      result->tensors.push_back({prefix + info->name, tensor.Reshaped(info->shape)});
    }
    result->memory.push_back(std::move(local));
    return absl::OkStatus();
  }
  Communicator tensor = tensor_.comm();
  const int writer = bucket / group_.size() % tensor_.size();
  if (tensor_.rank() != writer) {
    ANNULUS_ASSIGN_OR_RETURN(Request sent,
                             tensor.Send(local.ref().Rows(0, BucketOf(bucket).elements), writer, 0));
    return sent.Wait();
  }
  std::map<std::string, TensorRef> whole;
  for (const ParamInfo* info : params_of(params_.table())) {
    const Tensor& memory = result->memory.emplace_back(Device{}, local.ref().dtype(), info->logical);
    whole[info->name] = memory.ref();
    result->tensors.push_back({prefix + info->name, memory.ref()});
  }
  for (int rank = 0; rank < tensor_.size(); ++rank) {
    const ParamTable table = BuildParamTable(model_, {.rank = rank, .size = tensor_.size()});
    Tensor received;
    TensorRef values = local.ref();
    if (rank != writer) {
      received = Tensor(Device{}, values.dtype(), {table.buckets[static_cast<size_t>(bucket)].elements});
      values = received.ref();
      ANNULUS_ASSIGN_OR_RETURN(Request request, tensor.Receive(values, rank, 0));
      ANNULUS_RETURN_IF_ERROR(request.Wait());
    }
    for (const ParamInfo* info : params_of(table)) {
      for (const LogicalRun& run : LogicalRuns(*info, 0, info->shape.elements())) {
        CopyElements(values, info->offset + run.local, whole.at(info->name), run.logical, run.elements);
      }
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
      if (mine) ANNULUS_RETURN_IF_ERROR(AddWholeTensors(bucket, prefix, std::move(host), &result));
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
      ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef whole, find(name));
      ANNULUS_RETURN_IF_ERROR(CheckTensor(name, whole, info.logical, state.dtype()));
      if (run.begin >= run.end) continue;
      const int64_t to_local = ShardBegin(info.bucket) - info.offset;
      const HostValues local = LocalValues(info, whole, to_local + run.begin, to_local + run.end);
      Upload(ctx_, local.ref.raw(), local.ref.bytes(), state.Rows(run.begin, run.end));
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
