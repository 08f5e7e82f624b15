#pragma once

// How long the computing of a step was held up, by cause.

#include <array>

#include "annulus/device/span_clock.h"

namespace annulus {

enum class WaitKind { kExchange, kGradients, kParameters, kTensor };
inline constexpr size_t kWaitKinds = 4;

class WaitClock {
 public:
  explicit WaitClock(Device device)
      : waits_{SpanClock(device), SpanClock(device), SpanClock(device), SpanClock(device)} {}
  WaitClock(WaitClock&&) = default;

  // The waiting of `kind` begins and ends here in the order of `stream`. Begin and End alternate, with one
  // stream a pair.
  void Begin(WaitKind kind, StreamHandle stream);
  void End(WaitKind kind, StreamHandle stream);

  // Seconds of the waits that ended since the last call. Those that a GPU has not come to the end of yet
  // count in a later call.
  double TakeSeconds(WaitKind kind) { return Of(kind).Take().seconds; }

 private:
  SpanClock& Of(WaitKind kind) { return waits_[static_cast<size_t>(kind)]; }

  std::array<SpanClock, kWaitKinds> waits_;
};

}  // namespace annulus
