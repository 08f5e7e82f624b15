#pragma once

// How long the computing of a step was held up, by cause. Where a stream waits, pairs of events around that
// point are read later, so that measuring never stops the host; where the host waits (CPUs: the stream is
// null), its clock.

#include <array>
#include <chrono>
#include <vector>

#include "annulus/device/stream.h"

namespace annulus {

enum class WaitKind { kExchange, kGradients, kParameters };
inline constexpr size_t kWaitKinds = 3;

class WaitClock {
 public:
  explicit WaitClock(Device device) : device_(device) {}
  WaitClock(WaitClock&&) = default;

  // The waiting of `kind` begins and ends here in the order of `stream`. Begin and End alternate, with one
  // stream a pair.
  void Begin(WaitKind kind, StreamHandle stream);
  void End(WaitKind kind, StreamHandle stream);

  // Seconds of the waits that ended since the last call. Those that a GPU has not come to the end of yet
  // count in a later call.
  double TakeSeconds(WaitKind kind);

 private:
  struct Pair {
    Event begin, end;
  };
  struct Waits {
    bool open = false;  // between Begin and End
    Pair now;           // stream: the open pair
    std::vector<Pair> pending;
    std::chrono::steady_clock::time_point host_begin;
    double host_seconds = 0;
  };
  Waits& Of(WaitKind kind) { return waits_[static_cast<size_t>(kind)]; }

  Device device_;
  std::array<Waits, kWaitKinds> waits_;
  std::vector<Pair> free_;
};

}  // namespace annulus
