#pragma once

// How long stretches of work took, without stopping the host to measure them: on a stream pairs of events
// that are read later, on CPUs (the stream is null) the host's clock.

#include <chrono>
#include <cstdint>
#include <vector>

#include "annulus/device/stream.h"

namespace annulus {

class SpanClock {
 public:
  explicit SpanClock(Device device) : device_(device) {}
  SpanClock(SpanClock&&) = default;

  // A span begins and ends here in the order of `stream`. Begin and End alternate, with one stream a pair.
  void Begin(StreamHandle stream);
  void End(StreamHandle stream);
  bool open() const { return open_; }  // between Begin and End

  struct Spans {
    double seconds = 0;
    int64_t count = 0;
  };
  // The spans that ended since the last call. Those that a GPU has not come to the end of yet count in a
  // later call.
  Spans Take();

 private:
  struct Pair {
    Event begin, end;
  };

  Device device_;
  bool open_ = false;
  Pair now_;  // of a stream: the open span
  std::vector<Pair> pending_, free_;
  std::chrono::steady_clock::time_point host_begin_;
  Spans host_;
};

}  // namespace annulus
