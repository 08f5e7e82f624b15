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
//     sender     [after ...][wait for ready][copy rows of each field]--[write arrived at the receiver]
//     receiver                                          [wait for arrived]--whoever needs the rows
//
// Where copies are long the flag is written on a stream beside them: on theirs it holds up the next copy, by
// 4% at 16 MiB. The detour costs a few microseconds, so short messages go without.
//
// All of it is enqueued: the device writes a flag of the peer's memory and waits for one of its own. A flag
// is set when it holds at least the number of the execution, which is the same on all ranks and grows by one,
// so flags are never cleared. No flag is ahead of who waits for it. The receiver that writes `ready` begins
// its next execution only with all messages of this one, the waiting sender's among them; another receiver of
// the same number in the next plan may be there already, hence a flag for each. `arrived` of the next
// execution follows a `ready` that the waiting receiver itself has yet to write. So a slot is written by the
// sender only after its last reader of the execution before, too.
//
// A kernel may wait for `arrived` as streams do (ArrivalsOf), though it holds all multiprocessors: what it
// waits for was enqueued before it, on other streams, and needs none. On the peer's side nothing but what
// this rank has enqueued before is waited for either: collectives that may not start beside the kernel are
// waited for at the same places of all ranks' compute streams. A throttled link takes a multiprocessor, so
// there it may not.
//
// The waits of streams have no limit of their own; Abort() ends them by setting this rank's flags to the last
// number.
//
// A throttled link (link_hold.h) is taken before the copy, and `arrived` is written when it is free again.

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <optional>

#include "../../src/device/cuda_call.h"
#include "annulus/device/gpu.h"
#include "annulus/device/wait_reports.h"
#include "binding.h"
#include "copy_engine.h"
#include "link_hold.h"
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

// Lanes of StreamTransport: one for each lane of rounds.h and each of these roles. Messages to a rank take
// its two lanes for copies in turn: the flags, events and notes of one are written while the other copies.
constexpr size_t kCopyLanes = 2, kLanesToRank = kCopyLanes + 1;  // and one for flags
constexpr size_t kArrivals = 0, kReady = 1, kCopies = 2;         // kCopies + kLanesToRank * r, ...: to rank r
constexpr int64_t kLongBytes = int64_t{8} << 20;

size_t LaneFor(size_t role, ExchangeLane lane) { return role * kTransferLanes + static_cast<size_t>(lane); }

class CopyEngineTransport : public StreamTransport {
 public:
  CopyEngineTransport(Communicator cp, Device device, LinkThrottle throttle)
      : StreamTransport(cp, device),
        memory_(std::move(cp), device),
        sends_(kTransferLanes * static_cast<size_t>(cp_.size())),
        reports_(device),
        abort_stream_(device, StreamPriority::kHigh) {
    const size_t roles = kCopies + kLanesToRank * static_cast<size_t>(cp_.size());
    if (throttle.bytes_per_second > 0) hold_.emplace(device, throttle, cp_.size(), roles * kTransferLanes);
  }

  ~CopyEngineTransport() override {
    if (!aborted_) Synchronize();
  }

  // Collective.
  absl::Status Load() {
    ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(flags_.Load()));
    const absl::StatusOr<GpuInfo> gpu = DescribeGpu(device_.index);
    ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(gpu.status()));
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> gpus, cp_.AllGatherStrings(gpu->identity));
    for (const std::string& identity : gpus) same_gpu_.push_back(identity == gpu->identity);
    return absl::OkStatus();
  }
  TransportKind kind() const override { return TransportKind::kCopyEngine; }
  int64_t device_bytes() const override { return memory_.bytes(); }
  bool has_arrival_flags() const override { return !hold_.has_value(); }

  Arrivals ArrivalsOf(const Step& step) override {
    Arrivals arrivals;
    std::vector<std::string> names;
    for (const int before : step.after) {
      if (!ArrivesDuring(running_->rank, step, before)) continue;
      const auto receive = static_cast<size_t>(before);
      arrivals.flags.push_back({Arrived(cp_.rank(), running_->rank.steps[receive].message), count_});
      names.push_back(running_->texts[receive]);
    }
    arrivals.report = reports_.Add(std::move(names));
    return arrivals;
  }

  // Kernels that gave up, before a call of this process fails by it.
  absl::Status Health() override {
    const std::string gave_up = reports_.Text();
    return gave_up.empty() ? absl::OkStatus() : absl::InternalError("a kernel gave up: " + gave_up);
  }

  absl::StatusOr<std::vector<SlotMemory>> Slots(Context& ctx, const ExchangePlan& plan,
                                                const SlotSource& source) override {
    const StreamPlan& mine = PlanOf(plan);
    layout_ = PoolLayout(mine, source);
    ANNULUS_RETURN_IF_ERROR(Fit(mine, layout_));
    const std::vector<StreamPlan::PoolSlot>& pool = mine.pools[static_cast<size_t>(cp_.rank())];
    std::vector<SlotMemory> slots(mine.rank.slots.size());
    for (size_t place = 0; place < pool.size(); ++place) {
      SlotMemory& slot = slots[static_cast<size_t>(pool[place].slot)];
      const std::vector<SlotField>& fields = layout_.FieldsOf(pool[place].kind);
      for (size_t f = 0; f < fields.size(); ++f) {
        slot.fields.emplace_back(FieldAt(cp_.rank(), place, f), fields[f].dtype, device_,
                                 FieldShape(fields[f], mine.kind_rows[pool[place].kind]));
      }
    }
    for (size_t i = 0; i < slots.size(); ++i) {
      const SlotSpec& spec = mine.rank.slots[i];
      if (spec.home) {
        slots[i] = source.home(spec.payload);
      } else if (slots[i].fields.empty()) {
        slots[i] = ScratchSlot(ctx, source.fields(spec), SlotRows(plan, spec));
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
  // Documents of the next batch cut what one message moves into a few; flags are small, making room is not.
  static constexpr int64_t kSpareFlags = 4;

  static int64_t Aligned(int64_t bytes) {
    return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
  }
  // which: below kCopyLanes for copies, kCopyLanes for flags
  static size_t LaneToRank(int peer, size_t which, ExchangeLane lane) {
    return LaneFor(kCopies + kLanesToRank * static_cast<size_t>(peer) + which, lane);
  }
  // Of the next message to that rank.
  size_t NextCopyLane(int peer, ExchangeLane lane) {
    return LaneToRank(peer, sends_[LaneFor(static_cast<size_t>(peer), lane)]++ % kCopyLanes, lane);
  }

  std::string NameOf(size_t lane) const override {
    const size_t role = lane / kTransferLanes;
    const std::string what =
        absl::StrCat("exchange ", Name(static_cast<ExchangeLane>(lane % kTransferLanes)));
    if (role == kArrivals) return what + ", in";
    if (role == kReady) return what + ", ready";
    constexpr const char* kNames[kLanesToRank] = {"", ", second", ", flags"};
    const size_t to = role - kCopies;
    return absl::StrCat(what, ", to rank ", to / kLanesToRank, kNames[to % kLanesToRank]);
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
  char* FieldAt(int cp_rank, size_t place, size_t field) const {
    return memory_.at(cp_rank) + FlagBytes() + layout_.OffsetOf(cp_rank, place, field);
  }

  absl::Status MakeRoom(const StreamPlan& plan, const SlotSource& source) override {
    return Fit(plan, PoolLayout(plan, source));
  }

  // What every rank decides alike, from what is the same on all of them.
  absl::Status Fit(const StreamPlan& plan, const PoolLayout& layout) {
    const bool enough = plan.messages <= messages_ && FlagBytes() + layout.bytes() <= memory_.bytes();
    if (plan.messages == 0 || (enough && count_ + 1 < kLastCount)) return absl::OkStatus();
    messages_ = std::max<int64_t>(messages_, kSpareFlags * plan.messages);
    pool_bytes_ = std::max(pool_bytes_, layout.bytes());
    own_flags_ = nullptr;
    ANNULUS_RETURN_IF_ERROR(memory_.Resize(FlagBytes() + pool_bytes_));
    own_flags_ = Arrived(cp_.rank(), 0);
    count_ = 0;
    return absl::OkStatus();
  }

  absl::Status Begin(const Run& run) override {
    if (run.plan.messages > 0) ++count_;  // else ranks may leave the call out
    running_ = &run.plan;
    const std::vector<StreamPlan::PoolSlot>& pool = run.plan.pools[static_cast<size_t>(cp_.rank())];
    for (size_t place = 0; place < pool.size(); ++place) {
      const SlotMemory& slot = run.binding.slots[static_cast<size_t>(pool[place].slot)];
      ANNULUS_CHECK(slot.fields[0].raw() == FieldAt(cp_.rank(), place, 0))
          << run.plan.name << ": slot " << pool[place].slot
          << " receives, but is not from the last Slots call";
    }
    return absl::OkStatus();
  }

  // Readiness first: in the order of the host no rank waits for what another writes behind a wait of this
  // round.
  absl::Status Transfer(const Run& run, const Launch& round) override {
    std::vector<int> receives;
    for (const int s : round.steps) {
      if (run.step(s).kind == StepKind::kReceive) receives.push_back(s);
    }
    for (const int s : receives) ANNULUS_RETURN_IF_ERROR(WriteReady(run, s, round.lane));
    for (const int s : round.steps) {
      if (run.step(s).kind == StepKind::kSend) ANNULUS_RETURN_IF_ERROR(Send(run, s, round.lane));
    }
    // Arrivals are seen in this order.
    std::stable_sort(receives.begin(), receives.end(), [&](int a, int b) {
      return run.plan.needed_by[static_cast<size_t>(a)] < run.plan.needed_by[static_cast<size_t>(b)];
    });
    for (const int s : receives) ANNULUS_RETURN_IF_ERROR(AwaitArrival(run, s, round.lane));
    return absl::OkStatus();
  }

  absl::Status WriteReady(const Run& run, int s, ExchangeLane lane) {
    const Step& step = run.step(s);
    const StreamHandle ready = StreamOf(LaneFor(kReady, lane));
    Await(run, s, ready);
    Start(run, s, ready);
    return flags_.Write(ready, Ready(step.peer, cp_.rank(), step.message), count_);
  }

  absl::Status AwaitArrival(const Run& run, int s, ExchangeLane lane) {
    const StreamHandle arrivals = StreamOf(LaneFor(kArrivals, lane));
    ANNULUS_RETURN_IF_ERROR(flags_.Wait(arrivals, Arrived(cp_.rank(), run.step(s).message), count_));
    Complete(run, s, LaneFor(kArrivals, lane));
    return absl::OkStatus();
  }

  absl::Status Send(const Run& run, int s, ExchangeLane round_lane) {
    const Step& step = run.step(s);
    const size_t lane = NextCopyLane(step.peer, round_lane);
    const StreamHandle stream = StreamOf(lane);
    Await(run, s, stream);
    ANNULUS_RETURN_IF_ERROR(flags_.Wait(stream, Ready(cp_.rank(), step.peer, step.message), count_));
    Start(run, s, stream);
    if (hold_) ANNULUS_RETURN_IF_ERROR(hold_->Take(stream, lane, step.peer, run.BytesOf(s)));
    ANNULUS_RETURN_IF_ERROR(CopyRows(run, s, lane, stream));
    if (hold_) ANNULUS_RETURN_IF_ERROR(hold_->Hold(stream, lane));
    const size_t flags = LaneToRank(step.peer, kCopyLanes, round_lane);
    const StreamHandle writes = run.BytesOf(s) < kLongBytes ? stream : StreamBehind(flags, lane);
    ANNULUS_RETURN_IF_ERROR(flags_.Write(writes, Arrived(step.peer, step.message), count_));
    Complete(run, s, lane);
    return absl::OkStatus();
  }

  absl::Status CopyRows(const Run& run, int s, size_t lane, StreamHandle stream) {
    const Step& step = run.step(s);
    const StreamPlan::PeerRows& target = run.plan.peer_rows[static_cast<size_t>(s)];
    const size_t kind = run.plan.pools[static_cast<size_t>(step.peer)][target.place].kind;
    const std::vector<SlotField>& fields = layout_.FieldsOf(kind);
    const SlotMemory& slot = run.SlotOf(s);
    ANNULUS_CHECK(fields.size() == slot.fields.size()) << run.plan.texts[static_cast<size_t>(s)];
    for (size_t f = 0; f < fields.size(); ++f) {
      const TensorRef rows = run.RowsOf(s, slot.fields[f]);
      ANNULUS_CHECK(rows.bytes() == step.rows.rows.size() * RowBytes(fields[f]))
          << run.plan.texts[static_cast<size_t>(s)] << ": field " << f << " is " << ToString(rows.shape());
      char* const to = FieldAt(step.peer, target.place, f) + target.begin * RowBytes(fields[f]);
      if (target.taken_as_it_comes && same_gpu_[static_cast<size_t>(step.peer)]) {
        ANNULUS_RETURN_IF_ERROR(CopyThroughHost(to, rows, lane, stream));
        continue;
      }
      ANNULUS_RETURN_IF_ERROR(
          CudaStatus("cudaMemcpyAsync", cudaMemcpyAsync(to, rows.raw(), static_cast<size_t>(rows.bytes()),
                                                        cudaMemcpyDeviceToDevice, stream)));
    }
    return absl::OkStatus();
  }

  // Within a GPU CUDA copies by a kernel, which never starts beside one that waits for it on all
  // multiprocessors. Through the host copy engines do it.
  absl::Status CopyThroughHost(char* to, const TensorRef& rows, size_t lane, StreamHandle stream) {
    constexpr int64_t kPieceBytes = int64_t{4} << 20;
    PinnedBuffer& piece = pieces_[lane];
    if (piece.data() == nullptr) piece = PinnedBuffer(device_, kPieceBytes);
    const char* from = static_cast<const char*>(rows.raw());
    for (int64_t at = 0; at < rows.bytes(); at += kPieceBytes) {
      const auto bytes = static_cast<size_t>(std::min(kPieceBytes, rows.bytes() - at));
      for (const auto& [target, source] :
           {std::pair<void*, const void*>{piece.data(), from + at}, {to + at, piece.data()}}) {
        ANNULUS_RETURN_IF_ERROR(
            CudaStatus("cudaMemcpyAsync", cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream)));
      }
    }
    return absl::OkStatus();
  }

  StreamFlags flags_;
  PeerMemory memory_;
  int64_t messages_ = 0;       // flags of each kind
  int64_t pool_bytes_ = 0;     // of slots
  PoolLayout layout_;          // of the last Slots call
  uint32_t count_ = 0;         // executions on this memory
  std::vector<size_t> sends_;  // so far, by peer and lane
  std::optional<LinkHold> hold_;
  std::vector<bool> same_gpu_;             // by rank
  std::map<size_t, PinnedBuffer> pieces_;  // by lane; where ranks share a GPU
  WaitReports reports_;
  const StreamPlan* running_ = nullptr;  // of the execution under way
  Stream abort_stream_;
  std::atomic<uint32_t*> own_flags_{nullptr};  // both kinds, for Abort
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeCopyEngineTransport(Communicator cp, Context& ctx,
                                                                           LinkThrottle throttle) {
  ANNULUS_RETURN_IF_ERROR(CheckPeerMemory(cp, ctx.device));
  auto transport = std::make_unique<CopyEngineTransport>(cp, ctx.device, throttle);
  ANNULUS_RETURN_IF_ERROR(transport->Load());
  return transport;
}

}  // namespace annulus
