#pragma once

// How the messages of an exchange plan move, and where the slots that receive them lie.

#include <memory>
#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

enum class TransportKind {
  kHost,        // Send and Receive of the communicator, polled by the host
  kNccl,        // grouped ncclSend and ncclRecv on a stream of their own
  kCopyEngine,  // copies into peers' memory over CUDA IPC, ordered by flags in device memory; no SMs
};
absl::string_view Name(TransportKind kind);  // "host", "nccl", "copy engine"

class ExchangeTransport {
 public:
  virtual ~ExchangeTransport() = default;
  virtual TransportKind kind() const = 0;

  // Memory for every slot of this rank's part of the plan: the caller's tensors for home slots, else of the
  // same dtype and shape as these, in the order of the plan. Uninitialised; valid until the caller's
  // ArenaScope on ctx.scratch ends or Slots is called again. Slots and Execute are called alike by all ranks
  // of the group; only for a plan that has no messages between any ranks may some leave them out.
  virtual absl::StatusOr<std::vector<TensorRef>> Slots(Context& ctx, const ExchangePlan& plan,
                                                       TensorRef home_kv, TensorRef home_grad) = 0;

  // Runs this rank's part of the plan on slots of the last Slots call. On GPUs everything is enqueued and the
  // results are ordered on ctx.stream(); waiting is counted in ctx.waits, steps are noted in ctx.recorder.
  // A rank that waits for its peers waits without limit: the deadline of a watchdog ends it.
  virtual absl::Status Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                               ExchangeStats* stats) = 0;

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
                                                                 Context& ctx);

}  // namespace annulus
