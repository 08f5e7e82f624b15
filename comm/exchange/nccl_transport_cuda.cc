// Rounds as groups of ncclSend and ncclRecv. KV and gradients have an NCCL communicator and a stream each
// (rounds.h says why): what NCCL enqueues on one communicator runs in order. All ranks enqueue on the two in
// one order, by (level, lane), so that kernels of one cannot keep out those of the other.

#include <array>

#include "../gpu_backend.h"
#include "../nccl_call.h"
#include "annulus/device/gpu.h"
#include "nccl_transport.h"
#include "stream_transport.h"

namespace annulus {
namespace {

constexpr size_t kLanes = 2;  // ExchangeLane::kKv, kKvGrad

// Of each lane. A CTA of NCCL takes a multiprocessor from the computing beside it; between GPUs whose links
// are fast enough to need more of them, copy engines do the work.
constexpr int kMaxCtas = 8;

class NcclTransport : public StreamTransport {
 public:
  NcclTransport(Communicator cp, Device device) : StreamTransport(std::move(cp), device) {}

  ~NcclTransport() override {
    if (aborted_) return;
    Synchronize();
    for (ncclComm_t comm : comms_) {
      if (comm != nullptr) ncclCommDestroy(comm);
    }
  }

  // Collective; fails on all ranks or on none.
  absl::Status Connect() {
    for (ncclComm_t& comm : comms_) {
      ANNULUS_ASSIGN_OR_RETURN(comm, ConnectNccl(cp_, device_, kMaxCtas));
    }
    return absl::OkStatus();
  }

  TransportKind kind() const override { return TransportKind::kNccl; }

  absl::Status Health() override {
    for (ncclComm_t comm : comms_) {
      if (aborted_) break;
      ncclResult_t state = ncclSuccess;
      ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclCommGetAsyncError(comm, &state), device_, comm));
      if (state != ncclInProgress)
        ANNULUS_RETURN_IF_ERROR(Prefixed(ANNULUS_NCCL(state, device_, comm), "exchange by NCCL: "));
    }
    return absl::OkStatus();
  }

  void Abort() override {
    if (aborted_.exchange(true)) return;
    for (ncclComm_t comm : comms_) ncclCommAbort(comm);
  }

 private:
  std::string NameOf(size_t lane) const override { return lane == 0 ? "exchange kv" : "exchange gradients"; }

  absl::Status Begin(const Run&) override { return absl::OkStatus(); }

  absl::Status Transfer(const Run& run, const Launch& round) override {
    const size_t lane = static_cast<size_t>(round.lane);
    const StreamHandle stream = StreamOf(lane);
    for (const int s : round.steps) Await(run, s, stream);
    const ncclComm_t comm = comms_[lane];
    ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclGroupStart(), device_, comm));
    absl::Status status;
    for (const int s : round.steps) {
      if (status.ok()) status = Enqueue(run, s, comm, stream);
    }
    // Also after an error: an open group would swallow later calls.
    const absl::Status ended = ANNULUS_NCCL(ncclGroupEnd(), device_, comm);
    ANNULUS_RETURN_IF_ERROR(status);
    ANNULUS_RETURN_IF_ERROR(ended);
    for (const int s : round.steps) Complete(run, s, lane);
    return absl::OkStatus();
  }

  absl::Status Enqueue(const Run& run, int s, ncclComm_t comm, StreamHandle stream) const {
    const Step& step = run.step(s);
    const TensorRef rows = run.RowsOf(s);
    const size_t bytes = static_cast<size_t>(rows.bytes());
    if (step.kind == StepKind::kSend)
      return ANNULUS_NCCL(ncclSend(rows.raw(), bytes, ncclUint8, step.peer, comm, stream), device_, comm);
    return ANNULUS_NCCL(ncclRecv(rows.raw(), bytes, ncclUint8, step.peer, comm, stream), device_, comm);
  }

  std::array<ncclComm_t, kLanes> comms_{};
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeNcclTransport(Communicator cp, Context& ctx) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(cp, ctx));
  if (!shared.empty())
    return Invalid("exchange by NCCL: ", shared, ": expected a GPU of its own for each rank");
  ANNULUS_RETURN_IF_ERROR(cp.AgreeOk(UseGpu(ctx.device.index)));
  auto transport = std::make_unique<NcclTransport>(std::move(cp), ctx.device);
  ANNULUS_RETURN_IF_ERROR(transport->Connect());
  return transport;
}

}  // namespace annulus
