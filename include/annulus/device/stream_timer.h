#pragma once

// How long work takes: by events in the order of the context's stream, on CPUs by the host's clock.

#include <chrono>

#include "annulus/device/context.h"

namespace annulus {

class StreamTimer {
 public:
  explicit StreamTimer(Context& ctx)
      : ctx_(ctx), begin_(ctx.device, EventTiming::kTimed), end_(ctx.device, EventTiming::kTimed) {}

  void Begin() {
    host_begin_ = std::chrono::steady_clock::now();
    begin_.Record(ctx_.stream());
  }
  // Of what was enqueued since Begin; the host waits until it is done.
  double Seconds() {
    end_.Record(ctx_.stream());
    end_.Synchronize();
    if (ctx_.device.kind == DeviceKind::kCuda) return Event::Seconds(begin_, end_);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - host_begin_).count();
  }

 private:
  Context& ctx_;
  Event begin_, end_;
  std::chrono::steady_clock::time_point host_begin_;
};

}  // namespace annulus
