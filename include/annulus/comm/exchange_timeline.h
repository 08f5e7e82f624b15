#pragma once

// When the steps of an executed plan ran: recorded on every rank and brought to one time, in the form in
// which Simulate predicts it, so that whatever draws or compares predicted times takes measured ones.
//
//   StepClock clock(ctx.device);
//   RETURN_IF_ERROR(clock.Start(ctx, cp));                        // ranks begin together
//   ExchangeStats stats{.clock = &clock};
//   RETURN_IF_ERROR(transport.Execute(ctx, plan, binding, &stats));
//   ASSIGN_OR_RETURN(Simulation measured, clock.Take(plan, cp));  // the same on every rank
//
// What is measured. Computing: on GPUs from event to event of the stream that runs it, on CPUs from call to
// return. A transfer: from when both of its ends are ready for it until its end has what it waits for, by
// events of the transfer's stream or by the clock of the host that polls it. (Simulate counts a message that
// queues up behind another of its lane from its turn; what is under way in either direction at any time is
// the same.) Copies and NCCL's transfers wait for their peers on the device; this is not counted.
//
// Times of ranks. Clocks of hosts are compared at barriers: nobody leaves one before all have come. Where
// that leaves the clocks of two ranks equal they are taken to be (ranks of one host read the same one), else
// they are put right by the middle of what it leaves. The device's clock is tied to that of its host once, to
// some microseconds.

#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/comm/exchange_simulate.h"
#include "annulus/device/context.h"

namespace annulus {

class StepClock {
 public:
  explicit StepClock(Device device) : device_(device), run_(device) {}

  // Before an execution. Waits for the device. Collective.
  absl::Status Start(Context& ctx, Communicator cp);

  // Of transports: the execution, and each of its steps, begins and ends here in the order of the stream;
  // null: now. The last execution counts.
  void BeginRun(size_t steps, StreamHandle stream);
  void Begin(size_t step, StreamHandle stream);
  void End(size_t step, StreamHandle stream);
  void EndRun(int64_t bytes_sent, StreamHandle stream);

  // Of all ranks, from the first that begins; a rank's `exposed` is what it did not compute from its
  // beginning to its end. FailedPrecondition on every rank unless each recorded every step of the plan. Waits
  // for the device. Collective.
  absl::StatusOr<Simulation> Take(const ExchangePlan& plan, Communicator cp);

 private:
  // A point in time.
  struct Mark {
    enum class Place { kNone, kHost, kStream } place = Place::kNone;
    double seconds = 0;  // kHost: of the host's clock
    Event event = {};    // kStream
  };
  struct Interval {
    explicit Interval(Device device)
        : begin{.event = Event(device, EventTiming::kTimed)},
          end{.event = Event(device, EventTiming::kTimed)} {}
    Mark begin, end;
  };

  void Set(Mark* mark, StreamHandle stream);
  double Seconds(const Mark& mark) const;  // by the clock of rank 0's host
  absl::Status Check(const ExchangePlan& plan, int cp_rank) const;

  const Device device_;
  Event zero_;               // GPU
  double zero_seconds_ = 0;  // when that was, by the host's clock
  double ahead_ = 0;         // of the host's clock before that of rank 0
  Interval run_;
  std::vector<Interval> intervals_;  // by step; more than the last execution has, so that events are kept
  size_t steps_ = 0;
  int64_t bytes_sent_ = 0;
};

// What lies beside what in a timeline.
struct TimelineOverlap {
  double both_ways =
      0;  // seconds that two ranks had messages to each other under way at once; over all pairs
  double shorter_way = 0;    // seconds of each pair's direction that was busy for less; over all pairs
  double transfers = 0;      // seconds that a rank sent or received; over all ranks
  double under_compute = 0;  // of these, in which it computed as well
};
TimelineOverlap OverlapOf(const ExchangePlan& plan, const Simulation& simulation);

// "both directions between ranks at once for 2.310 of 2.400 ms (96%); 4.700 of 5.000 ms of transfers (94%)
// under computing"
std::string OverlapText(const TimelineOverlap& overlap);

}  // namespace annulus
