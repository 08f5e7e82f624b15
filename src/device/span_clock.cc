#include "annulus/device/span_clock.h"

#include <algorithm>
#include <utility>

#include "annulus/base/check.h"

namespace annulus {

using Clock = std::chrono::steady_clock;

void SpanClock::Begin(StreamHandle stream) {
  ANNULUS_CHECK(!open_) << "a span begins twice";
  open_ = true;
  if (stream == nullptr) {
    host_begin_ = Clock::now();
    return;
  }
  if (free_.empty()) {
    now_ = {Event(device_, EventTiming::kTimed), Event(device_, EventTiming::kTimed)};
  } else {
    now_ = std::move(free_.back());
    free_.pop_back();
  }
  now_.begin.Record(stream);
}

void SpanClock::End(StreamHandle stream) {
  ANNULUS_CHECK(open_) << "a span ends before it begins";
  open_ = false;
  if (stream == nullptr) {
    host_.seconds += std::chrono::duration<double>(Clock::now() - host_begin_).count();
    ++host_.count;
    return;
  }
  now_.end.Record(stream);
  pending_.push_back(std::move(now_));
}

SpanClock::Spans SpanClock::Take() {
  Spans spans = std::exchange(host_, {});
  const auto over =
      std::partition(pending_.begin(), pending_.end(), [](const Pair& pair) { return !pair.end.Done(); });
  for (auto pair = over; pair != pending_.end(); ++pair) {
    spans.seconds += Event::Seconds(pair->begin, pair->end);
    ++spans.count;
    free_.push_back(std::move(*pair));
  }
  pending_.erase(over, pending_.end());
  return spans;
}

}  // namespace annulus
