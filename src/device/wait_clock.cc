#include "annulus/device/wait_clock.h"

#include <algorithm>
#include <utility>

#include "annulus/base/check.h"

namespace annulus {

using Clock = std::chrono::steady_clock;

void WaitClock::Begin(WaitKind kind, StreamHandle stream) {
  Waits& waits = Of(kind);
  ANNULUS_CHECK(!waits.open) << "wait " << static_cast<int>(kind) << " begins twice";
  waits.open = true;
  if (stream == nullptr) {
    waits.host_begin = Clock::now();
    return;
  }
  if (free_.empty()) {
    waits.now = {Event(device_, EventTiming::kTimed), Event(device_, EventTiming::kTimed)};
  } else {
    waits.now = std::move(free_.back());
    free_.pop_back();
  }
  waits.now.begin.Record(stream);
}

void WaitClock::End(WaitKind kind, StreamHandle stream) {
  Waits& waits = Of(kind);
  ANNULUS_CHECK(waits.open) << "wait " << static_cast<int>(kind) << " ends before it begins";
  waits.open = false;
  if (stream == nullptr) {
    waits.host_seconds += std::chrono::duration<double>(Clock::now() - waits.host_begin).count();
    return;
  }
  waits.now.end.Record(stream);
  waits.pending.push_back(std::move(waits.now));
}

double WaitClock::TakeSeconds(WaitKind kind) {
  Waits& waits = Of(kind);
  double seconds = std::exchange(waits.host_seconds, 0.0);
  const auto over = std::partition(waits.pending.begin(), waits.pending.end(),
                                   [](const Pair& pair) { return !pair.end.Done(); });
  for (auto pair = over; pair != waits.pending.end(); ++pair) {
    seconds += Event::Seconds(pair->begin, pair->end);
    free_.push_back(std::move(*pair));
  }
  waits.pending.erase(over, waits.pending.end());
  return seconds;
}

}  // namespace annulus
