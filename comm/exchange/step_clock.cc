#include <algorithm>
#include <chrono>
#include <limits>
#include <map>

#include "annulus/comm/exchange_timeline.h"
#include "plan_text.h"

namespace annulus {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Every rank's values, of which all have as many, one rank behind the other.
absl::StatusOr<std::vector<double>> AllGather(std::vector<double> mine, Communicator& cp) {
  std::vector<double> all(mine.size() * static_cast<size_t>(cp.size()));
  const auto ref = [](std::vector<double>& values) {
    return TensorRef(values.data(), DType::kF64, Device{}, {static_cast<int64_t>(values.size())});
  };
  ANNULUS_RETURN_IF_ERROR(cp.AllGather(ref(mine), ref(all)));
  return all;
}

// By how much the clock of this rank's host is ahead of that of rank 0.
absl::StatusOr<double> ClockAhead(Communicator& cp) {
  constexpr size_t kMeetings = 32;
  std::vector<double> mine;  // when this rank came to each meeting and left it
  for (size_t i = 0; i < kMeetings; ++i) {
    mine.push_back(Now());
    ANNULUS_RETURN_IF_ERROR(cp.Barrier());
    mine.push_back(Now());
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<double> all, AllGather(mine, cp));
  double least = -std::numeric_limits<double>::infinity(), most = -least;
  for (size_t i = 0; i < kMeetings; ++i) {
    const double first_came = all[2 * i], first_left = all[2 * i + 1];
    least = std::max(least, mine[2 * i] - first_left);
    most = std::min(most, mine[2 * i + 1] - first_came);
  }
  return least <= 0 && 0 <= most ? 0 : (least + most) / 2;
}

// What a rank tells the others: bytes, when its execution began and ended, and the same of each step.
constexpr size_t kBytes = 0, kRun = 1, kSteps = 3;
StepTiming TimingAt(const double* values) { return {.start = values[0], .end = values[1]}; }

// A message begins when both of its ends are ready. (Clocks that are wrong by as much as it takes must not
// make it end before.)
void MeetEnds(const ExchangePlan& plan, std::vector<std::vector<StepTiming>>* steps) {
  std::map<int, double> ready;  // by message
  const auto each = [&](const auto& fn) {
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
        const Step& step = plan.ranks[r].steps[s];
        if (IsTransfer(step.kind)) fn(step, (*steps)[r][s]);
      }
    }
  };
  each([&](const Step& step, const StepTiming& timing) {
    double& both = ready.try_emplace(step.message, timing.start).first->second;
    both = std::max(both, timing.start);
  });
  each([&](const Step& step, StepTiming& timing) {
    timing.start = std::min(ready.at(step.message), timing.end);
  });
}

}  // namespace

absl::Status StepClock::Start(Context& ctx, Communicator cp) {
  constexpr int kTries = 64;
  constexpr double kCloseSeconds = 50e-6;
  ANNULUS_ASSIGN_OR_RETURN(ahead_, ClockAhead(cp));
  ctx.lane.Synchronize();
  // The device comes to the event between two looks at the host's clock: the closest two count. They are far
  // apart while the device, or the core of this thread, is another process's.
  double closest = std::numeric_limits<double>::infinity();
  for (int i = 0; i < (device_.kind == DeviceKind::kCuda ? kTries : 1) && closest > kCloseSeconds; ++i) {
    Event event(device_, EventTiming::kTimed);
    const double before = Now();
    event.Record(ctx.stream());
    event.Synchronize();
    const double took = Now() - before;
    if (took >= closest) continue;
    closest = took;
    zero_ = std::move(event);
    zero_seconds_ = before + took / 2;
  }
  steps_ = 0;
  return cp.Barrier();
}

void StepClock::Set(Mark* mark, StreamHandle stream) {
  ANNULUS_CHECK(mark->place == Mark::Place::kNone) << "recorded twice in one execution";
  if (stream == nullptr) {
    mark->place = Mark::Place::kHost;
    mark->seconds = Now();
    return;
  }
  mark->place = Mark::Place::kStream;
  mark->event.Record(stream);
}

double StepClock::Seconds(const Mark& mark) const {
  if (mark.place == Mark::Place::kHost) return mark.seconds - ahead_;
  mark.event.Synchronize();
  return zero_seconds_ + Event::Seconds(zero_, mark.event) - ahead_;
}

void StepClock::BeginRun(size_t steps, StreamHandle stream) {
  while (intervals_.size() < steps) intervals_.emplace_back(device_);
  steps_ = steps;
  for (Interval& each : intervals_) each.begin.place = each.end.place = Mark::Place::kNone;
  run_.begin.place = run_.end.place = Mark::Place::kNone;
  Set(&run_.begin, stream);
}

void StepClock::Begin(size_t step, StreamHandle stream) { Set(&intervals_[step].begin, stream); }
void StepClock::End(size_t step, StreamHandle stream) { Set(&intervals_[step].end, stream); }

void StepClock::EndRun(int64_t bytes_sent, StreamHandle stream) {
  bytes_sent_ = bytes_sent;
  Set(&run_.end, stream);
}

absl::Status StepClock::Check(const ExchangePlan& plan, int cp_rank) const {
  const auto recorded = [](const Interval& interval) {
    return interval.begin.place != Mark::Place::kNone && interval.end.place != Mark::Place::kNone;
  };
  const size_t expected = plan.ranks[static_cast<size_t>(cp_rank)].steps.size();
  if (steps_ != expected || !recorded(run_)) {
    return absl::FailedPreconditionError(absl::StrCat(plan.name, ": rank ", cp_rank, " recorded ", steps_,
                                                      " steps, expected an execution of ", expected));
  }
  for (size_t s = 0; s < expected; ++s) {
    if (recorded(intervals_[s])) continue;
    return absl::FailedPreconditionError(
        absl::StrCat(plan.name, ": ", StepText(plan, cp_rank, s), " was not recorded"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Simulation> StepClock::Take(const ExchangePlan& plan, Communicator cp) {
  ANNULUS_RETURN_IF_ERROR(cp.AgreeOk(Check(plan, cp.rank())));
  std::vector<double> mine = {static_cast<double>(bytes_sent_), Seconds(run_.begin), Seconds(run_.end)};
  for (size_t s = 0; s < steps_; ++s) {
    mine.push_back(Seconds(intervals_[s].begin));
    mine.push_back(Seconds(intervals_[s].end));
  }
  size_t most = 0;
  for (const RankPlan& rank : plan.ranks) most = std::max(most, rank.steps.size());
  mine.resize(kSteps + 2 * most);
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<double> all, AllGather(mine, cp));
  const auto of_rank = [&](size_t r) { return all.data() + r * mine.size(); };

  Simulation result;
  result.source = TimeSource::kMeasured;
  double first = std::numeric_limits<double>::infinity();
  for (size_t r = 0; r < plan.ranks.size(); ++r) first = std::min(first, of_rank(r)[kRun]);
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const StepTiming run = TimingAt(of_rank(r) + kRun);
    std::vector<StepTiming>& timings = result.steps.emplace_back();
    double computed = 0;
    for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
      const StepTiming timing = TimingAt(of_rank(r) + kSteps + 2 * s);
      timings.push_back({.start = timing.start - first, .end = timing.end - first});
      if (IsCompute(plan.ranks[r].steps[s].kind)) computed += timing.end - timing.start;
    }
    result.makespan = std::max(result.makespan, run.end - first);
    result.compute.push_back(computed);
    result.exposed.push_back(run.end - run.start - computed);
    result.bytes_sent.push_back(static_cast<int64_t>(of_rank(r)[kBytes]));
  }
  MeetEnds(plan, &result.steps);
  return result;
}

}  // namespace annulus
