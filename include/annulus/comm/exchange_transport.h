#pragma once

// How the messages of an exchange plan move, where the slots that receive them lie, and running a plan.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/comm/exchange_plan.h"
#include "annulus/device/context.h"
#include "annulus/device/wait_report.h"

namespace annulus {

class StepClock;

// A slot is one or more tensors ("fields": a partial output is the output and its LSE), each with the slot's
// rows as first dimension.
struct SlotMemory {
  std::vector<TensorRef> fields = {};
};
struct SlotField {
  DType dtype = DType::kF32;
  Shape row;  // of one row
};

// What the caller knows of slots.
struct SlotSource {
  std::function<SlotMemory(Payload)> home;  // the caller's tensors, of home slots
  // Of any other slot; the same on every rank.
  std::function<std::vector<SlotField>(const SlotSpec&)> fields;
};

struct ExchangeBinding {
  std::vector<SlotMemory> slots = {};  // one per SlotSpec
  // Computing step of this rank: kAttend, kCopy, kReduce. On CPUs it must call ctx.Poll() at least every few
  // hundred microseconds; on GPUs it enqueues on ctx.stream(). The step is the one in the plan that Execute
  // was given, so its place there identifies it.
  std::function<absl::Status(const Step&)> compute = {};
  // By step, of a transport with arrival flags (or empty): `compute` of this step, of KeyArrival::kDuring,
  // waits for its keys itself (ExchangeTransport::ArrivalsOf), and that is not counted as waiting.
  std::vector<bool> takes_arrivals = {};
};

// A number in device memory, raised when a receive of this rank is complete: then *flag - awaited is not
// negative as a 32-bit integer.
struct ArrivalFlag {
  const uint32_t* flag = nullptr;
  uint32_t awaited = 0;
};
struct Arrivals {
  std::vector<ArrivalFlag> flags = {};  // of the receives that the step takes (ArrivesDuring), in its order
  WaitReport* report = nullptr;         // for the kernel; its parts are these
};

struct ExchangeStats {
  double exposed_seconds = 0;  // computing waited for transfers, the tail included; on GPUs in ctx.waits only
  int64_t bytes_sent = 0;
  StepClock* clock = nullptr;  // if any, records when each step runs (exchange_timeline.h)
};

enum class TransportKind {
  kHost,        // Send and Receive of the communicator, polled by the host
  kNccl,        // grouped ncclSend and ncclRecv on a stream of their own
  kCopyEngine,  // copies into peers' memory over CUDA IPC, ordered by flags in device memory; no SMs
};
absl::string_view Name(TransportKind kind);  // "host", "nccl", "copy engine"

// An artificial rate, so that slow links can be studied on one host: each message holds its link, from this
// rank to one peer, for at least bytes / rate. 0: none.
struct LinkThrottle {
  double bytes_per_second = 0;
};
std::string Label(LinkThrottle throttle);  // "LINKS THROTTLED to 2 GB/s", of every output so made; "" without

class ExchangeTransport {
 public:
  virtual ~ExchangeTransport() = default;
  virtual TransportKind kind() const = 0;

  // Memory for every slot of this rank's part of the plan, in its order: home slots are the caller's, others
  // uninitialised; valid until the caller's ArenaScope on ctx.scratch ends or Slots is called again. Slots
  // and Execute are called alike by all ranks of the group; only for a plan that has no messages between any
  // ranks may some leave them out.
  virtual absl::StatusOr<std::vector<SlotMemory>> Slots(Context& ctx, const ExchangePlan& plan,
                                                        const SlotSource& source) = 0;

  // Takes now what Slots and Execute would take at first use of this plan, or of one that needs no more:
  // memory that peers map, connections, events. Neither of them then allocates or waits for the device, which
  // a step may not. Home slots of `source` are not asked for. Collective.
  virtual absl::Status Reserve(const ExchangePlan& /*plan*/, const SlotSource& /*source*/) {
    return absl::OkStatus();
  }

  // Runs this rank's part of the plan on slots of the last Slots call. Transfers start before the computing
  // that hides them. On GPUs everything is enqueued and the results are ordered on ctx.stream(); on CPUs
  // transfers progress through ctx.progress while computing (the previous one is restored afterwards).
  // Waiting is counted in ctx.waits, steps are noted in ctx.recorder, `stats` are added to. A rank that waits
  // for its peers waits without limit: the deadline of a watchdog ends it.
  virtual absl::Status Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                               ExchangeStats* stats) = 0;

  // Whether a kernel can wait for receives itself: what they bring comes without multiprocessors.
  virtual bool has_arrival_flags() const { return false; }
  // Within `compute` of a step that takes arrivals.
  virtual Arrivals ArrivalsOf(const Step& /*step*/) { return {}; }

  // Memory on the device that it keeps for slots and flags, ctx.scratch left out.
  virtual int64_t device_bytes() const { return 0; }

  // For a watchdog, from any thread: an error that showed after the call that caused it; and giving up all
  // that is under way, so that a stuck device lets go. Nothing else may be called afterwards.
  virtual absl::Status Health() { return absl::OkStatus(); }
  virtual void Abort() {}
};

// The best transport for the group: on CPUs kHost; on GPUs kCopyEngine if all ranks are on one host and can
// map each other's memory, else kNccl if each has a GPU of its own, else kHost. Collective.
absl::StatusOr<TransportKind> ChooseTransport(Communicator cp, const Context& ctx);

// InvalidArgument, naming the reason, if the group cannot use this kind. `cp` is of the context's device
// (gpu_communicator.h). Collective.
absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeTransport(TransportKind kind, Communicator cp,
                                                                 Context& ctx, LinkThrottle throttle = {});

// InvalidArgument on every rank unless all ranks of the group hold plans with the same hash.
absl::Status AgreeOnPlan(const ExchangePlan& plan, Communicator& cp);

}  // namespace annulus
