#pragma once

// Running a plan on streams of a GPU. The host enqueues this rank's steps by level (rounds.h) and returns:
// computing on ctx.stream(), transfers on high-priority streams of the transport, each stream waiting by
// events for what its steps come after.
//
//     ctx.stream():       [attend 0]        [attend 1]  ...  [join]
//     operands in:           [receive 1] ------^    [receive 2]
//     operands to rank 3:    [send 0]  [send 1]
//
// Computing does not keep transfers out. The host enqueues the transfers of a level ahead of its computing,
// on streams of the highest priority, and NCCL lets computing become ready no sooner than its first messages:
// where both may start, their kernels take multiprocessors first (copy engines have none). Kernels of a
// transfer that becomes ready while computing fills the device take those of the next CTAs that end, before
// any CTA that has not started. So they are late by one CTA of attention at most, of the many that each
// multiprocessor runs one after the other in a kernel worth hiding behind; they need no multiprocessors set
// aside.
//
// A run begins behind what was enqueued on ctx.stream() before it, and ctx.stream() ends behind all transfers
// of this rank, so memory of the caller and of arenas follows the usual rule: whoever comes later on
// ctx.stream() may use it. Peers are waited for on the device without limit; a watchdog ends a job that
// hangs.

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "annulus/comm/exchange_transport.h"
#include "stream_plan.h"

namespace annulus {

class StreamTransport : public ExchangeTransport {
 public:
  ~StreamTransport() override;
  absl::StatusOr<std::vector<SlotMemory>> Slots(Context& ctx, const ExchangePlan& plan,
                                                const SlotSource& source) override;
  absl::Status Reserve(const ExchangePlan& plan, const SlotSource& source) final;
  absl::Status Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                       ExchangeStats* stats) final;

 protected:
  StreamTransport(Communicator cp, Device device) : cp_(std::move(cp)), device_(device), begin_(device) {}

  // One execution of a plan by this rank.
  struct Run {
    Context& ctx;
    const StreamPlan& plan;
    const RankPlan& rank;  // the caller's own, whose steps the binding knows
    const ExchangeBinding& binding;
    StepClock* const clock;  // null: nothing is recorded
    const Step& step(int s) const { return rank.steps[static_cast<size_t>(s)]; }
    const SlotMemory& SlotOf(int s) const { return binding.slots[static_cast<size_t>(step(s).slot)]; }
    // What a transfer moves of one field of its slot.
    TensorRef RowsOf(int s, const TensorRef& field) const {
      const RowRange& rows = plan.rows[static_cast<size_t>(s)];
      return field.Rows(rows.begin, rows.end);
    }
    int64_t BytesOf(int s) const;  // of all fields of a transfer
  };

  // What a transport takes beside events. Collective.
  virtual absl::Status MakeRoom(const StreamPlan& /*plan*/, const SlotSource& /*source*/) {
    return absl::OkStatus();
  }
  virtual absl::Status Begin(const Run& run) = 0;
  // Enqueues the transfers of a round: each is completed (Complete) on the stream of some lane.
  virtual absl::Status Transfer(const Run& run, const Launch& round) = 0;
  virtual std::string NameOf(size_t lane) const = 0;  // for reports; a lane is made when it is first used

  // The lane's stream, behind the beginning of the run.
  StreamHandle StreamOf(size_t lane);
  // `stream` goes on once all steps that step s comes after are complete.
  void Await(const Run& run, int s, StreamHandle stream);
  // The stream of `lane`, behind what is enqueued on that of `before` so far.
  StreamHandle StreamBehind(size_t lane, size_t before);
  // Step s, a transfer, begins with what is enqueued on the stream next.
  void Start(const Run& run, int s, StreamHandle stream) const;
  // Step s is complete with what is enqueued on the lane's stream. An event and a note for the recorder hold
  // the stream up by about 3 us, so a step that no other waits for has neither, unless it is the last of its
  // lane: in a report, a lane that is stuck in such steps waits for the last of them.
  void Complete(const Run& run, int s, size_t lane);

  const StreamPlan& PlanOf(const ExchangePlan& plan) { return plans_.Of(plan, cp_.rank()); }
  void Synchronize() const;  // the host waits for all lanes

  Communicator cp_;
  const Device device_;
  std::atomic<bool> aborted_{false};

 private:
  struct TransferLane {
    std::string name;
    Stream stream;
    Event end;          // of the last run that used it
    int64_t run = 0;    // which that was
    int unmarked = -1;  // its last step without event and note, if none with them follows
  };

  void MakeEvents(const StreamPlan& plan);
  absl::Status Compute(const Run& run, int s);
  // The transfers that a computing step waits for, but those that its kernel does.
  std::vector<int> WaitsOf(const Run& run, size_t s) const;
  // ctx.stream() waits, which is counted.
  void AwaitTransfers(const Run& run, const std::vector<int>& transfers);
  void AwaitLanes(const Run& run);  // that the run used

  StreamPlans plans_;
  std::vector<std::unique_ptr<TransferLane>> lanes_;
  std::vector<Event> events_;  // by step, of whichever plan runs
  Event begin_;
  int64_t run_ = 0;
};

}  // namespace annulus
