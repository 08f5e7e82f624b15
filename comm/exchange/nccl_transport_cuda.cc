// Rounds as groups of ncclSend and ncclRecv. Each lane of rounds.h has an NCCL communicator and a stream:
// what NCCL enqueues on one communicator runs in order. All ranks enqueue on them in one order, by (level,
// lane), so that kernels of one cannot keep out those of another.
//
// Throttled, a round begins with one byte from and to each of its peers, so that both ends of a message take
// the link (link_hold.h) when both are there, and ends when all of its links have been held:
//
//     [after ...][bytes to and from all peers][take links][messages][hold]
//
// Each rank keeps the times of the links from it and to it.

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "../gpu_backend.h"
#include "../nccl_call.h"
#include "annulus/device/gpu.h"
#include "link_hold.h"
#include "nccl_transport.h"
#include "stream_transport.h"

namespace annulus {
namespace {

// Of each lane. A CTA of NCCL takes a multiprocessor from the computing beside it; between GPUs whose links
// are fast enough to need more of them, copy engines do the work.
constexpr int kMaxCtas = 8;

class NcclTransport : public StreamTransport {
 public:
  NcclTransport(Communicator cp, Device device, LinkThrottle throttle)
      : StreamTransport(std::move(cp), device) {
    for (size_t lane = 0; lane < kTransferLanes; ++lane) gates_.emplace_back(device);
    if (throttle.bytes_per_second <= 0) return;
    hold_.emplace(device, throttle, 2 * cp_.size(), kTransferLanes);
    meeting_ = Buffer(device, 2 * cp_.size());
  }

  ~NcclTransport() override {
    if (aborted_) return;
    Synchronize();
    for (ncclComm_t comm : comms_) {
      if (comm != nullptr) ncclCommDestroy(comm);
    }
  }

  TransportKind kind() const override { return TransportKind::kNccl; }

  absl::Status Health() override {
    for (ncclComm_t comm : comms_) {
      if (aborted_) break;
      if (comm == nullptr) continue;
      ncclResult_t state = ncclSuccess;
      ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclCommGetAsyncError(comm, &state), device_, comm));
      if (state != ncclInProgress)
        ANNULUS_RETURN_IF_ERROR(Prefixed(ANNULUS_NCCL(state, device_, comm), "exchange by NCCL: "));
    }
    return absl::OkStatus();
  }

  void Abort() override {
    if (aborted_.exchange(true)) return;
    for (ncclComm_t comm : comms_) {
      if (comm != nullptr) ncclCommAbort(comm);
    }
  }

 private:
  std::string NameOf(size_t lane) const override {
    return absl::StrCat("exchange ", Name(static_cast<ExchangeLane>(lane)));
  }

  absl::Status Begin(const Run& run) override {
    begun_ = {};
    return Connect(run.plan);
  }
  absl::Status MakeRoom(const StreamPlan& plan, const SlotSource&) override { return Connect(plan); }

  // Communicators are made at the first plan that needs them, on all ranks or on none.
  absl::Status Connect(const StreamPlan& plan) {
    for (size_t lane = 0; lane < kTransferLanes; ++lane) {
      if (!plan.lanes[lane] || comms_[lane] != nullptr) continue;
      ANNULUS_ASSIGN_OR_RETURN(comms_[lane], ConnectNccl(cp_, device_, kMaxCtas));
    }
    return absl::OkStatus();
  }

  absl::Status Transfer(const Run& run, const Launch& round) override {
    const size_t lane = static_cast<size_t>(round.lane);
    const StreamHandle stream = StreamOf(lane);
    for (const int s : round.steps) Await(run, s, stream);
    if (hold_) {
      ANNULUS_RETURN_IF_ERROR(Meet(run, round, stream));
      for (const int s : round.steps) {
        const int link = run.step(s).peer + (run.step(s).kind == StepKind::kSend ? 0 : cp_.size());
        ANNULUS_RETURN_IF_ERROR(hold_->Take(stream, lane, link, run.BytesOf(s)));
      }
    }
    if (!std::exchange(begun_[lane], true) && WaitsForNothing(run, round)) LetComputingFollow(run, lane);
    for (const int s : round.steps) Start(run, s, stream);
    ANNULUS_RETURN_IF_ERROR(InGroup(comms_[lane], [&]() -> absl::Status {
      for (const int s : round.steps) ANNULUS_RETURN_IF_ERROR(Enqueue(run, s, comms_[lane], stream));
      return absl::OkStatus();
    }));
    if (hold_) ANNULUS_RETURN_IF_ERROR(hold_->Hold(stream, lane));
    for (const int s : round.steps) Complete(run, s, lane);
    return absl::OkStatus();
  }

  static bool WaitsForNothing(const Run& run, const Launch& round) {
    return std::all_of(round.steps.begin(), round.steps.end(),
                       [&](int s) { return run.step(s).after.empty(); });
  }

  // Computing that is enqueued from here on becomes ready when the lane's first messages do, whose stream
  // then goes first: computing that started before would keep their kernel out until its CTAs end, and those
  // of a persistent kernel end with it.
  void LetComputingFollow(const Run& run, size_t lane) {
    const StreamHandle computing = run.ctx.stream();
    gates_[lane].Record(StreamOf(lane));
    run.ctx.waits.Begin(WaitKind::kExchange, computing);
    gates_[lane].Hold(computing);
    run.ctx.waits.End(WaitKind::kExchange, computing);
  }

  // What `fn` enqueues starts together.
  template <typename Fn>
  absl::Status InGroup(ncclComm_t comm, const Fn& fn) const {
    ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(ncclGroupStart(), device_, comm));
    const absl::Status status = fn();
    // Also after an error: an open group would swallow later calls.
    const absl::Status ended = ANNULUS_NCCL(ncclGroupEnd(), device_, comm);
    return status.ok() ? ended : status;
  }

  absl::Status Enqueue(const Run& run, int s, ncclComm_t comm, StreamHandle stream) const {
    const Step& step = run.step(s);
    for (const TensorRef& field : run.SlotOf(s).fields) {
      const TensorRef rows = run.RowsOf(s, field);
      const size_t bytes = static_cast<size_t>(rows.bytes());
      if (bytes == 0) continue;
      const ncclResult_t enqueued = step.kind == StepKind::kSend
                                        ? ncclSend(rows.raw(), bytes, ncclUint8, step.peer, comm, stream)
                                        : ncclRecv(rows.raw(), bytes, ncclUint8, step.peer, comm, stream);
      ANNULUS_RETURN_IF_ERROR(ANNULUS_NCCL(enqueued, device_, comm));
    }
    return absl::OkStatus();
  }

  // The stream goes on when all peers of the round have come to it.
  absl::Status Meet(const Run& run, const Launch& round, StreamHandle stream) const {
    std::set<int> peers;
    for (const int s : round.steps) peers.insert(run.step(s).peer);
    ncclComm_t comm = comms_[static_cast<size_t>(round.lane)];
    char* const bytes = static_cast<char*>(meeting_.data());
    return InGroup(comm, [&]() -> absl::Status {
      for (const int peer : peers) {
        char* const from = bytes + 2 * peer;
        ANNULUS_RETURN_IF_ERROR(
            ANNULUS_NCCL(ncclSend(from, 1, ncclUint8, peer, comm, stream), device_, comm));
        ANNULUS_RETURN_IF_ERROR(
            ANNULUS_NCCL(ncclRecv(from + 1, 1, ncclUint8, peer, comm, stream), device_, comm));
      }
      return absl::OkStatus();
    });
  }

  std::array<std::atomic<ncclComm_t>, kTransferLanes> comms_{};
  std::vector<Event> gates_;                  // by lane
  std::array<bool, kTransferLanes> begun_{};  // lanes, in this run
  std::optional<LinkHold> hold_;
  Buffer meeting_;  // two bytes for each rank: to it, from it
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeNcclTransport(Communicator cp, Context& ctx,
                                                                     LinkThrottle throttle) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(cp, ctx));
  if (!shared.empty())
    return Invalid("exchange by NCCL: ", shared, ": expected a GPU of its own for each rank");
  ANNULUS_RETURN_IF_ERROR(cp.AgreeOk(UseGpu(ctx.device.index)));
  return std::make_unique<NcclTransport>(std::move(cp), ctx.device, throttle);
}

}  // namespace annulus
