// Copies straight into the slots of peers, by the copy engines: no multiprocessor takes part.
//
// Every rank has one piece of memory that all ranks map (peer_memory.h):
//
//     [ arrived flags | ready flags of each receiver | slots that receive ]
//
// The slots of a plan lie at places that every rank can work out for every other (StreamPlan). Flags are
// numbers, `arrived` one for a message, `ready` one for a message and receiver:
//
//     receiver   [after ...]--write ready at the sender
//     sender     [after ...][wait for ready][copy rows][write arrived at the receiver]
//     receiver                                          [wait for arrived]--whoever needs the rows
//
// All of it is enqueued: the device writes a flag of the peer's memory and waits for one of its own. A flag
// is set when it holds at least the number of the execution, which is the same on all ranks and grows by one,
// so flags are never cleared. No flag is ahead of who waits for it. The receiver that writes `ready` begins
// its next execution only with all messages of this one, the waiting sender's among them; another receiver of
// the same number in the next plan may be there already, hence a flag for each. `arrived` of the next
// execution follows a `ready` that the waiting receiver itself has yet to write. So a slot is written by the
// sender only after its last reader of the execution before, too.
//
// The waits have no limit of their own; Abort() ends them by setting this rank's flags to the last number.

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../../src/device/cuda_call.h"
#include "annulus/device/gpu.h"
#include "copy_engine.h"
#include "peer_memory.h"
#include "stream_transport.h"

namespace annulus {
namespace {

// cuStreamWriteValue32 and cuStreamWaitValue32. A write comes after everything on its stream, for all GPUs to
// see.
struct StreamFlags {
  absl::Status Load() {
    constexpr unsigned kVersion = 12000;  // of CUDA, whose forms of the functions these are
    ANNULUS_ASSIGN_OR_RETURN(void* const write_entry, DriverFunction("cuStreamWriteValue32", kVersion));
    ANNULUS_ASSIGN_OR_RETURN(void* const wait_entry, DriverFunction("cuStreamWaitValue32", kVersion));
    write = reinterpret_cast<PFN_cuStreamWriteValue32_v11070>(write_entry);
    wait = reinterpret_cast<PFN_cuStreamWaitValue32_v11070>(wait_entry);
    return absl::OkStatus();
  }
  absl::Status Write(StreamHandle stream, uint32_t* flag, uint32_t value) const {
    return Check("cuStreamWriteValue32",
                 write(stream, reinterpret_cast<CUdeviceptr>(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT));
  }
  // The stream goes on once *flag - value >= 0 in 32-bit arithmetic.
  absl::Status Wait(StreamHandle stream, const uint32_t* flag, uint32_t value) const {
    return Check("cuStreamWaitValue32",
                 wait(stream, reinterpret_cast<CUdeviceptr>(flag), value, CU_STREAM_WAIT_VALUE_GEQ));
  }

 private:
  static absl::Status Check(const char* call, CUresult code) {
    if (code == CUDA_SUCCESS) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat(call, ": CUresult ", static_cast<int>(code), " on ", CurrentDevice()));
  }

  PFN_cuStreamWriteValue32_v11070 write = nullptr;
  PFN_cuStreamWaitValue32_v11070 wait = nullptr;
};

// Lanes of StreamTransport: arrivals, copies to each rank and writing `ready`, each of KV and of gradients;
// then the second lanes of copies to each rank. Messages to a peer take the two in turn, so that one copies
// while the flags of the other are written: 336 GB/s of 16 MiB messages, 325 on one lane (H200).
constexpr size_t kPayloads = 2;  // ExchangeLane::kKv, kKvGrad
constexpr size_t kCopyLanes = 2;

class CopyEngineTransport : public StreamTransport {
 public:
  CopyEngineTransport(Communicator cp, Device device)
      : StreamTransport(cp, device),
        memory_(std::move(cp), device),
        sends_(kPayloads * static_cast<size_t>(cp_.size())),
        abort_stream_(device, StreamPriority::kHigh) {}

  ~CopyEngineTransport() override {
    if (!aborted_) Synchronize();
  }

  absl::Status Load() { return flags_.Load(); }
  TransportKind kind() const override { return TransportKind::kCopyEngine; }
  int64_t device_bytes() const override { return memory_.bytes(); }

  absl::StatusOr<std::vector<TensorRef>> Slots(Context& ctx, const ExchangePlan& plan, TensorRef home_kv,
                                               TensorRef home_grad) override {
    const StreamPlan& mine = PlanOf(plan);
    slot_bytes_ = {.kv = Aligned(home_kv.bytes()), .grad = Aligned(home_grad.bytes())};
    ANNULUS_RETURN_IF_ERROR(Reserve(mine));
    std::vector<TensorRef> slots;
    for (size_t i = 0; i < mine.rank.slots.size(); ++i) {
      const SlotSpec& slot = mine.rank.slots[i];
      const TensorRef& like = slot.payload == Payload::kKv ? home_kv : home_grad;
      if (slot.home) {
        slots.push_back(like);
      } else if (mine.pool[i].has_value()) {
        slots.emplace_back(SlotAt(cp_.rank(), *mine.pool[i]), like.dtype(), like.device(), like.shape());
      } else {
        slots.push_back(ctx.scratch.Allocate(like.dtype(), like.shape()));
      }
    }
    return slots;
  }

  void Abort() override {
    if (aborted_.exchange(true)) return;
    memory_.Abandon();
    uint32_t* const flags = own_flags_;
    if (flags == nullptr || !UseGpu(device_.index).ok()) return;
    for (int64_t i = 0; i < FlagCount(); ++i) {
      if (!flags_.Write(abort_stream_.handle(), flags + i, kLastCount).ok()) return;
    }
  }

 private:
  static constexpr uint32_t kLastCount = uint32_t{1} << 30;  // far from where differences of numbers overflow

  static int64_t Aligned(int64_t bytes) {
    return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
  }
  size_t ReadyLane(size_t payload) const {
    return kPayloads * (1 + static_cast<size_t>(cp_.size())) + payload;
  }
  // Of the next message to that rank.
  size_t NextCopyLane(int peer, size_t payload) {
    const size_t to = kPayloads * static_cast<size_t>(peer) + payload;
    const size_t turn = sends_[to]++ % kCopyLanes;
    return turn * (ReadyLane(0) + kPayloads) + kPayloads + to;
  }

  std::string NameOf(size_t lane) const override {
    const size_t lanes = ReadyLane(0) + kPayloads;
    if (lane >= lanes) return absl::StrCat(NameOf(lane - lanes), ", second");
    const char* const payload = lane % kPayloads == 0 ? "kv" : "gradients";
    const size_t owner = lane / kPayloads;
    if (owner == 0) return absl::StrCat("exchange ", payload, " in");
    if (owner > static_cast<size_t>(cp_.size())) return absl::StrCat("exchange ", payload, " ready");
    return absl::StrCat("exchange ", payload, " to rank ", owner - 1);
  }

  // `arrived` of every message, and `ready` of every message and receiver.
  int64_t FlagCount() const { return (1 + cp_.size()) * messages_; }
  int64_t FlagBytes() const { return Aligned(FlagCount() * static_cast<int64_t>(sizeof(uint32_t))); }
  uint32_t* Arrived(int at, int message) const {
    return reinterpret_cast<uint32_t*>(memory_.at(at)) + message;
  }
  uint32_t* Ready(int at, int receiver, int message) const {
    return Arrived(at, message) + (1 + receiver) * messages_;
  }
  char* SlotAt(int cp_rank, const PoolPlace& place) const {
    return memory_.at(cp_rank) + FlagBytes() + OffsetOf(place, slot_bytes_);
  }

  // What every rank decides alike, from what is the same on all of them.
  absl::Status Reserve(const StreamPlan& plan) {
    const int64_t pool = plan.PoolBytes(slot_bytes_);
    const bool enough = plan.messages <= messages_ && FlagBytes() + pool <= memory_.bytes();
    if (plan.messages == 0 || (enough && count_ + 1 < kLastCount)) return absl::OkStatus();
    messages_ = std::max<int64_t>(messages_, plan.messages);
    own_flags_ = nullptr;
    ANNULUS_RETURN_IF_ERROR(memory_.Resize(std::max(FlagBytes() + pool, memory_.bytes())));
    own_flags_ = Arrived(cp_.rank(), 0);
    count_ = 0;
    return absl::OkStatus();
  }

  absl::Status Begin(const Run& run) override {
    if (run.plan.messages > 0) ++count_;  // else ranks may leave the call out
    for (size_t i = 0; i < run.plan.pool.size(); ++i) {
      ANNULUS_CHECK(!run.plan.pool[i].has_value() ||
                    run.binding.slots[i].raw() == SlotAt(cp_.rank(), *run.plan.pool[i]))
          << run.plan.name << ": slot " << i << " receives, but is not from the last Slots call";
    }
    return absl::OkStatus();
  }

  absl::Status Transfer(const Run& run, const Launch& round) override {
    const size_t payload = static_cast<size_t>(round.lane);
    for (const int s : round.steps) {
      const bool sends = run.step(s).kind == StepKind::kSend;
      ANNULUS_RETURN_IF_ERROR(sends ? Send(run, s, payload) : Receive(run, s, payload));
    }
    return absl::OkStatus();
  }

  absl::Status Receive(const Run& run, int s, size_t payload) {
    const Step& step = run.step(s);
    const StreamHandle ready = StreamOf(ReadyLane(payload)), arrivals = StreamOf(payload);
    Await(run, s, ready);
    ANNULUS_RETURN_IF_ERROR(flags_.Write(ready, Ready(step.peer, cp_.rank(), step.message), count_));
    ANNULUS_RETURN_IF_ERROR(flags_.Wait(arrivals, Arrived(cp_.rank(), step.message), count_));
    Complete(run, s, payload);
    return absl::OkStatus();
  }

  absl::Status Send(const Run& run, int s, size_t payload) {
    const Step& step = run.step(s);
    const size_t lane = NextCopyLane(step.peer, payload);
    const StreamHandle stream = StreamOf(lane);
    Await(run, s, stream);
    ANNULUS_RETURN_IF_ERROR(flags_.Wait(stream, Ready(cp_.rank(), step.peer, step.message), count_));
    const TensorRef rows = run.RowsOf(s);
    const int64_t row_bytes = rows.bytes() / step.rows.size();
    char* const to =
        SlotAt(step.peer, run.plan.peer_place[static_cast<size_t>(s)]) + step.rows.begin * row_bytes;
    ANNULUS_RETURN_IF_ERROR(
        CudaStatus("cudaMemcpyAsync", cudaMemcpyAsync(to, rows.raw(), static_cast<size_t>(rows.bytes()),
                                                      cudaMemcpyDeviceToDevice, stream)));
    ANNULUS_RETURN_IF_ERROR(flags_.Write(stream, Arrived(step.peer, step.message), count_));
    Complete(run, s, lane);
    return absl::OkStatus();
  }

  StreamFlags flags_;
  PeerMemory memory_;
  int64_t messages_ = 0;       // flags of each kind
  SlotBytes slot_bytes_;       // of the last Slots call
  uint32_t count_ = 0;         // executions on this memory
  std::vector<size_t> sends_;  // so far, by peer and payload
  Stream abort_stream_;
  std::atomic<uint32_t*> own_flags_{nullptr};  // both kinds, for Abort
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeCopyEngineTransport(Communicator cp, Context& ctx) {
  ANNULUS_RETURN_IF_ERROR(CheckPeerMemory(cp, ctx.device));
  auto transport = std::make_unique<CopyEngineTransport>(cp, ctx.device);
  ANNULUS_RETURN_IF_ERROR(cp.AgreeOk(transport->Load()));
  return transport;
}

}  // namespace annulus
