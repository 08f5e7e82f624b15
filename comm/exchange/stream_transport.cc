#include "stream_transport.h"

#include "annulus/comm/exchange_timeline.h"
#include "annulus/device/trace.h"
#include "binding.h"
#include "plan_text.h"

namespace annulus {

StreamTransport::~StreamTransport() = default;

int64_t StreamTransport::Run::BytesOf(int s) const {
  int64_t bytes = 0;
  for (const TensorRef& field : SlotOf(s).fields) bytes += RowsOf(s, field).bytes();
  return bytes;
}

absl::StatusOr<std::vector<SlotMemory>> StreamTransport::Slots(Context& ctx, const ExchangePlan& plan,
                                                               const SlotSource& source) {
  return ScratchSlots(ctx, plan, cp_.rank(), source);
}

absl::Status StreamTransport::Reserve(const ExchangePlan& plan, const SlotSource& source) {
  const StreamPlan& mine = PlanOf(plan);
  MakeEvents(mine);
  return MakeRoom(mine, source);
}

void StreamTransport::MakeEvents(const StreamPlan& plan) {
  while (events_.size() < plan.rank.steps.size()) events_.emplace_back(device_);
}

absl::Status StreamTransport::Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                                      ExchangeStats* stats) {
  if (aborted_) return absl::AbortedError("the exchange was aborted");
  CheckBinding(plan, cp_.rank(), cp_.size(), binding);
  const Run run{.ctx = ctx,
                .plan = PlanOf(plan),
                .rank = plan.ranks[static_cast<size_t>(cp_.rank())],
                .binding = binding,
                .clock = stats->clock};
  MakeEvents(run.plan);
  ++run_;
  begin_.Record(ctx.stream());
  if (run.clock != nullptr) run.clock->BeginRun(run.rank.steps.size(), ctx.stream());
  ANNULUS_RETURN_IF_ERROR(Begin(run));
  // After an error the transfers go on, so that no other rank hangs; computing does not.
  absl::Status status;
  for (const Launch& launch : run.plan.launches) {
    const size_t first = static_cast<size_t>(launch.steps[0]);
    const TraceRange range(run.plan.texts[first]);
    if (launch.lane == ExchangeLane::kCompute) {
      AwaitTransfers(run, WaitsOf(run, first));
      if (status.ok()) status = Compute(run, launch.steps[0]);
      if (run.plan.is_awaited[first]) events_[first].Record(ctx.stream());
    } else {
      // A failed transfer ends the job: peers wait for it.
      const absl::Status enqueued = Transfer(run, launch);
      ANNULUS_CHECK(enqueued.ok()) << run.plan.name << ": " << run.plan.texts[first] << ": " << enqueued;
    }
  }
  AwaitLanes(run);
  int64_t bytes_sent = 0;
  for (size_t s = 0; s < run.plan.rank.steps.size(); ++s) {
    const bool sends = run.plan.rank.steps[s].kind == StepKind::kSend;
    if (sends) bytes_sent += run.BytesOf(static_cast<int>(s));
  }
  stats->bytes_sent += bytes_sent;
  if (run.clock != nullptr) run.clock->EndRun(bytes_sent, ctx.stream());
  return status;
}

absl::Status StreamTransport::Compute(const Run& run, int s) {
  const size_t step = static_cast<size_t>(s);
  const std::string& text = run.plan.texts[step];
  if (run.clock != nullptr) run.clock->Begin(step, run.ctx.stream());
  const absl::Status status = run.binding.compute(run.step(s));
  if (run.clock != nullptr) run.clock->End(step, run.ctx.stream());
  run.ctx.recorder.Note("compute", text, run.ctx.stream());
  return Prefixed(status, absl::StrCat(text, ": "));
}

StreamHandle StreamTransport::StreamOf(size_t lane) {
  if (lanes_.size() <= lane) lanes_.resize(lane + 1);
  if (lanes_[lane] == nullptr) {
    lanes_[lane] = std::make_unique<TransferLane>(TransferLane{
        .name = NameOf(lane), .stream = Stream(device_, StreamPriority::kHigh), .end = Event(device_)});
  }
  TransferLane& used = *lanes_[lane];
  if (used.run != run_) {
    used.run = run_;
    used.unmarked = -1;
    begin_.Hold(used.stream.handle());
  }
  return used.stream.handle();
}

StreamHandle StreamTransport::StreamBehind(size_t lane, size_t before) {
  const StreamHandle stream = StreamOf(lane);
  Event& so_far = lanes_[before]->end;
  so_far.Record(lanes_[before]->stream.handle());
  so_far.Hold(stream);
  return stream;
}

void StreamTransport::Await(const Run& run, int s, StreamHandle stream) {
  for (const int before : run.step(s).after) events_[static_cast<size_t>(before)].Hold(stream);
}

void StreamTransport::Start(const Run& run, int s, StreamHandle stream) const {
  if (run.clock != nullptr) run.clock->Begin(static_cast<size_t>(s), stream);
}

void StreamTransport::Complete(const Run& run, int s, size_t lane) {
  TransferLane& on = *lanes_[lane];
  if (run.clock != nullptr) run.clock->End(static_cast<size_t>(s), on.stream.handle());
  on.unmarked = run.plan.is_awaited[static_cast<size_t>(s)] ? -1 : s;
  if (on.unmarked >= 0) return;
  events_[static_cast<size_t>(s)].Record(on.stream.handle());
  run.ctx.recorder.Note(on.name, run.plan.texts[static_cast<size_t>(s)], on.stream.handle());
}

std::vector<int> StreamTransport::WaitsOf(const Run& run, size_t s) const {
  std::vector<int> waits = run.plan.compute_waits[s];
  if (run.binding.takes_arrivals.empty() || !run.binding.takes_arrivals[s]) return waits;
  ANNULUS_CHECK(has_arrival_flags()) << run.plan.texts[s] << ": no kernel can wait for " << Name(kind());
  std::erase_if(waits,
                [&](int before) { return ArrivesDuring(run.rank, run.step(static_cast<int>(s)), before); });
  return waits;
}

void StreamTransport::AwaitTransfers(const Run& run, const std::vector<int>& transfers) {
  if (transfers.empty()) return;
  Context& ctx = run.ctx;
  ctx.waits.Begin(WaitKind::kExchange, ctx.stream());
  for (const int transfer : transfers) events_[static_cast<size_t>(transfer)].Hold(ctx.stream());
  ctx.waits.End(WaitKind::kExchange, ctx.stream());
}

void StreamTransport::AwaitLanes(const Run& run) {
  Context& ctx = run.ctx;
  std::vector<TransferLane*> used;
  for (const auto& lane : lanes_) {
    if (lane != nullptr && lane->run == run_) used.push_back(lane.get());
  }
  if (used.empty()) return;
  for (TransferLane* lane : used) {
    lane->end.Record(lane->stream.handle());
    if (lane->unmarked < 0) continue;
    const std::string& text = run.plan.texts[static_cast<size_t>(lane->unmarked)];
    ctx.recorder.Note(lane->name, text, lane->stream.handle());
  }
  ctx.waits.Begin(WaitKind::kExchange, ctx.stream());
  for (const TransferLane* lane : used) lane->end.Hold(ctx.stream());
  ctx.waits.End(WaitKind::kExchange, ctx.stream());
}

void StreamTransport::Synchronize() const {
  for (const auto& lane : lanes_) {
    if (lane != nullptr) lane->stream.Synchronize();
  }
}

}  // namespace annulus
