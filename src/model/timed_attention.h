#pragma once

// Attention with its exchange under the clock of its window, where a step has clocks.

#include "annulus/model/mixer.h"

namespace annulus {

template <typename Fn>
absl::Status Timed(Context& ctx, ModelStep& step, int64_t window, Pass pass, Fn&& attend) {
  if (step.clocks == nullptr) return attend();
  SpanClock& clock = step.clocks->Of(window, pass);
  clock.Begin(ctx.stream());
  const absl::Status status = attend();
  clock.End(ctx.stream());
  return status;
}

}  // namespace annulus
