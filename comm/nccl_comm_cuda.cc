// NCCL behind a communicator: one NCCL communicator and one stream a group.
//
// An operation is enqueued on the group's stream behind an event of ctx.stream(); Wait() makes ctx.stream()
// hold for the event behind the operation. Messages are collected and enqueued as one NCCL group, since NCCL
// runs what is not grouped one after the other: two ranks that send first would wait for each other.

#include <atomic>
#include <cstdio>
#include <utility>

#include "annulus/device/gpu.h"
#include "annulus/device/trace.h"
#include "gpu_backend.h"
#include "nccl_call.h"
#include "nccl_comm.h"

namespace annulus {
namespace {

// A CTA of NCCL takes a multiprocessor from the computing beside it. Of an H200's 132, 16 leave 88% to it;
// more would shorten what is not hidden, fewer lengthen it.
constexpr int kMaxCtas = 16;

ncclDataType_t NcclType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kI32:
      return ncclInt32;
    case DType::kI64:
      return ncclInt64;
    case DType::kU8:
      return ncclUint8;
  }
  return ncclNumTypes;
}

ncclRedOp_t NcclOp(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return ncclSum;
    case ReduceOp::kMax:
      return ncclMax;
    case ReduceOp::kMin:
      return ncclMin;
  }
  return ncclNumOps;
}

// Events that are made once and used again.
class EventPool {
 public:
  explicit EventPool(Device device) : device_(device) {}
  Event Take() {
    if (free_.empty()) return Event(device_);
    Event event = std::move(free_.back());
    free_.pop_back();
    return event;
  }
  void Return(Event event) { free_.push_back(std::move(event)); }

 private:
  Device device_;
  std::vector<Event> free_;
};

class NcclComm : public GpuBackend, public std::enable_shared_from_this<NcclComm> {
 public:
  // Collective. Every rank of the group has a GPU of its own.
  static absl::StatusOr<std::shared_ptr<CommBackend>> Create(Communicator host, Context& ctx,
                                                             std::string lane) {
    auto comm = std::make_shared<NcclComm>(std::move(host), ctx, std::move(lane));
    if (comm->size() > 1) ANNULUS_RETURN_IF_ERROR(comm->Initialize());
    return std::shared_ptr<CommBackend>(std::move(comm));
  }
  NcclComm(Communicator host, Context& ctx, std::string lane)
      : GpuBackend(std::move(host), ctx, std::move(lane)),
        stream_(ctx.device, StreamPriority::kHigh),
        ready_(ctx.device),
        events_(ctx.device) {}
  ~NcclComm() override;

  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_RETURN_IF_ERROR(FlushMessages());
    ANNULUS_ASSIGN_OR_RETURN(Communicator part, host_.Split(color, key));
    return Create(std::move(part), ctx_, LaneOf(color));
  }
  absl::Status Health() override;
  void Abort() override;

 protected:
  absl::StatusOr<Request> Start(const GpuOperation& operation) override;

 private:
  // What is enqueued together, with the event behind it.
  struct Batch {
    explicit Batch(std::shared_ptr<NcclComm> owner) : comm(std::move(owner)), done(comm->events_.Take()) {}
    ~Batch() { comm->events_.Return(std::move(done)); }
    std::shared_ptr<NcclComm> comm;
    Event done;
    absl::Status status;
  };
  class BatchRequest;

  absl::Status Initialize();
  // The group's stream goes on only after what is enqueued on ctx.stream() now.
  void HoldForContext() {
    ready_.Record(ctx_.stream());
    ready_.Hold(stream_.handle());
  }
  absl::Status Enqueue(const GpuOperation& operation);
  absl::Status EnqueueGroup(const std::vector<GpuOperation>& messages);
  absl::Status FlushMessages();
  void Note(std::string what) { ctx_.recorder.Note(lane_, std::move(what), stream_.handle()); }

  std::atomic<ncclComm_t> comm_{nullptr};  // null in a group of one, and after Abort
  Stream stream_;
  Event ready_;
  EventPool events_;
  std::vector<GpuOperation> messages_;  // posted, not enqueued
  std::shared_ptr<Batch> open_;         // theirs
};

class NcclComm::BatchRequest : public RequestState {
 public:
  explicit BatchRequest(std::shared_ptr<Batch> batch) : batch_(std::move(batch)) {}

  absl::StatusOr<bool> Test() override {
    ANNULUS_RETURN_IF_ERROR(Enqueued());
    if (batch_->done.Done()) return true;
    ANNULUS_RETURN_IF_ERROR(batch_->comm->Health());
    return false;
  }
  absl::Status Wait() override {
    ANNULUS_RETURN_IF_ERROR(Enqueued());
    batch_->done.Hold(batch_->comm->ctx_.stream());
    return absl::OkStatus();
  }

 private:
  absl::Status Enqueued() {
    ANNULUS_RETURN_IF_ERROR(batch_->comm->FlushMessages());
    return batch_->status;
  }
  const std::shared_ptr<Batch> batch_;
};

absl::Status NcclComm::Initialize() {
  ANNULUS_ASSIGN_OR_RETURN(comm_, ConnectNccl(host_, ctx_.device, kMaxCtas));
  return absl::OkStatus();
}

NcclComm::~NcclComm() {
  if (!Health().ok()) Abort();
  ncclComm_t comm = comm_.exchange(nullptr);
  if (comm == nullptr) return;
  const absl::Status destroyed = ANNULUS_NCCL(ncclCommDestroy(comm), ctx_.device, nullptr);
  if (!destroyed.ok()) std::fprintf(stderr, "annulus: %s\n", destroyed.ToString().c_str());
}

absl::Status NcclComm::Health() {
  ANNULUS_RETURN_IF_ERROR(host_.Health());
  ncclComm_t comm = comm_;
  if (comm == nullptr) return absl::OkStatus();
  ncclResult_t state = ncclSuccess;
  ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclCommGetAsyncError(comm, &state), ctx_.device, comm));
  if (state == ncclInProgress) return absl::OkStatus();
  return Prefixed(ANNULUS_NCCL(state, ctx_.device, comm),
                  absl::StrCat(lane_, ", rank ", rank(), " of ", size(), ": "));
}

void NcclComm::Abort() {
  ncclComm_t comm = comm_.exchange(nullptr);
  if (comm != nullptr && UseGpu(ctx_.device.index).ok()) ncclCommAbort(comm);
}

absl::StatusOr<Request> NcclComm::Start(const GpuOperation& operation) {
  if (comm_ == nullptr) {
    return absl::AbortedError(
        absl::StrCat(lane_, ": ", ToString(operation), " after the group was given up"));
  }
  if (operation.call == GpuCall::kSend || operation.call == GpuCall::kReceive) {
    if (open_ == nullptr) open_ = std::make_shared<Batch>(shared_from_this());
    HoldForContext();
    messages_.push_back(operation);
    return Request(std::make_unique<BatchRequest>(open_));
  }
  ANNULUS_RETURN_IF_ERROR(FlushMessages());
  std::string what = ToString(operation);
  const TraceRange range(absl::StrCat(lane_, ": ", what));
  HoldForContext();
  ANNULUS_RETURN_IF_ERROR(Enqueue(operation));
  Note(std::move(what));
  auto batch = std::make_shared<Batch>(shared_from_this());
  batch->done.Record(stream_.handle());
  return Request(std::make_unique<BatchRequest>(std::move(batch)));
}

absl::Status NcclComm::Enqueue(const GpuOperation& o) {
  ncclComm_t comm = comm_;
  cudaStream_t stream = stream_.handle();
  const void* in = o.in.raw();
  void* out = o.out.raw();
  const ncclDataType_t type = NcclType(o.call == GpuCall::kReceive ? o.out.dtype() : o.in.dtype());
  const size_t in_count = static_cast<size_t>(o.in.elements()),
               out_count = static_cast<size_t>(o.out.elements());
  switch (o.call) {
    case GpuCall::kSend:
      return ANNULUS_NCCL(ncclSend(in, in_count, type, o.peer, comm, stream), ctx_.device, comm);
    case GpuCall::kReceive:
      return ANNULUS_NCCL(ncclRecv(out, out_count, type, o.peer, comm, stream), ctx_.device, comm);
    case GpuCall::kAllReduce:
      return ANNULUS_NCCL(ncclAllReduce(in, out, in_count, type, NcclOp(o.op), comm, stream), ctx_.device,
                          comm);
    case GpuCall::kReduceScatter:
      return ANNULUS_NCCL(ncclReduceScatter(in, out, out_count, type, NcclOp(o.op), comm, stream),
                          ctx_.device, comm);
    case GpuCall::kAllGather:
      return ANNULUS_NCCL(ncclAllGather(in, out, in_count, type, comm, stream), ctx_.device, comm);
    case GpuCall::kBroadcast:
      return ANNULUS_NCCL(ncclBroadcast(in, out, in_count, type, o.peer, comm, stream), ctx_.device, comm);
  }
  return absl::OkStatus();
}

absl::Status NcclComm::EnqueueGroup(const std::vector<GpuOperation>& messages) {
  ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclGroupStart(), ctx_.device, comm_));
  absl::Status status;
  for (const GpuOperation& message : messages) {
    if (status.ok()) status = Enqueue(message);
  }
  const absl::Status ended = ANNULUS_NCCL(ncclGroupEnd(), ctx_.device, comm_);
  return status.ok() ? ended : status;
}

absl::Status NcclComm::FlushMessages() {
  if (open_ == nullptr) return absl::OkStatus();
  const std::shared_ptr<Batch> batch = std::exchange(open_, nullptr);
  const std::vector<GpuOperation> messages = std::exchange(messages_, {});
  const TraceRange range(absl::StrCat(lane_, ": ", messages.size(), " messages"));
  batch->status = EnqueueGroup(messages);
  if (!batch->status.ok()) return batch->status;
  for (const GpuOperation& message : messages) Note(ToString(message));
  batch->done.Record(stream_.handle());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Communicator> MakeNcclComm(Communicator host, Context& ctx, std::string lane) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(host, ctx));
  if (!shared.empty())
    return Invalid("gpu link ", Name(GpuLink::kNccl), ": ", shared,
                   ": expected a GPU of its own for every rank");
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> backend,
                           NcclComm::Create(std::move(host), ctx, std::move(lane)));
  return Communicator(std::move(backend));
}

std::string NcclVersion() {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return "NCCL of unknown version";
  return absl::StrCat("NCCL ", version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace annulus
