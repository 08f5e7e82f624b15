// Rounds as groups of ncclSend and ncclRecv. KV and gradients have an NCCL communicator and a stream each
// (rounds.h says why): what NCCL enqueues on one communicator runs in order. All ranks enqueue on the two in
// one order, by (level, lane), so that kernels of one cannot keep out those of the other.

#include <nccl.h>

#include <array>

#include "../gpu_backend.h"
#include "annulus/device/gpu.h"
#include "nccl_transport.h"
#include "stream_transport.h"

namespace annulus {
namespace {

constexpr size_t kLanes = 2;  // ExchangeLane::kKv, kKvGrad

// Of each lane. A CTA of NCCL takes a multiprocessor from the computing beside it; between GPUs whose links
// are fast enough to need more of them, copy engines do the work.
constexpr int kMaxCtas = 8;

absl::Status NcclStatus(const char* call, ncclResult_t code, ncclComm_t comm) {
  if (code == ncclSuccess) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(call, ": ", ncclGetErrorString(code), ": ", ncclGetLastError(comm)));
}

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
      ncclUniqueId id{};
      absl::Status made;
      if (cp_.rank() == 0) made = NcclStatus("ncclGetUniqueId", ncclGetUniqueId(&id), nullptr);
      ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(made));
      ANNULUS_ASSIGN_OR_RETURN(const std::string bytes,
                               cp_.BroadcastString(std::string(id.internal, sizeof(id.internal)), 0));
      bytes.copy(id.internal, sizeof(id.internal));
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.maxCTAs = kMaxCtas;
      const ncclResult_t code = ncclCommInitRankConfig(&comm, cp_.size(), id, cp_.rank(), &config);
      ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(NcclStatus("ncclCommInitRankConfig", code, nullptr)));
    }
    return absl::OkStatus();
  }

  TransportKind kind() const override { return TransportKind::kNccl; }

  absl::Status Health() override {
    for (ncclComm_t comm : comms_) {
      if (aborted_) break;
      ncclResult_t state = ncclSuccess;
      ANNULUS_RETURN_IF_ERROR(NcclStatus("ncclCommGetAsyncError", ncclCommGetAsyncError(comm, &state), comm));
      if (state != ncclInProgress) ANNULUS_RETURN_IF_ERROR(NcclStatus("exchange by NCCL", state, comm));
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
    ANNULUS_RETURN_IF_ERROR(NcclStatus("ncclGroupStart", ncclGroupStart(), comm));
    absl::Status status;
    for (const int s : round.steps) {
      if (status.ok()) status = Enqueue(run, s, comm, stream);
    }
    // Also after an error: an open group would swallow later calls.
    const absl::Status ended = NcclStatus("ncclGroupEnd", ncclGroupEnd(), comm);
    ANNULUS_RETURN_IF_ERROR(status);
    ANNULUS_RETURN_IF_ERROR(ended);
    for (const int s : round.steps) Complete(run, s, lane);
    return absl::OkStatus();
  }

  static absl::Status Enqueue(const Run& run, int s, ncclComm_t comm, StreamHandle stream) {
    const Step& step = run.step(s);
    const TensorRef rows = run.RowsOf(s);
    const size_t bytes = static_cast<size_t>(rows.bytes());
    if (step.kind == StepKind::kSend)
      return NcclStatus("ncclSend", ncclSend(rows.raw(), bytes, ncclUint8, step.peer, comm, stream), comm);
    return NcclStatus("ncclRecv", ncclRecv(rows.raw(), bytes, ncclUint8, step.peer, comm, stream), comm);
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
