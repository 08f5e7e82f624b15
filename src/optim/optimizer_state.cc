// Parameters and optimizer state as whole tensors, and back: what a checkpoint holds.

#include <algorithm>
#include <cstring>
#include <map>

#include "annulus/device/trace.h"
#include "annulus/device/transfer.h"
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

}  // namespace annulus
