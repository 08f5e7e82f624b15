#pragma once

// Attention with its exchange under the clock of its class, where a step has clocks.

#include "annulus/model/mixer.h"

namespace annulus {

template <typename Fn>
absl::Status Timed(Context& ctx, ModelStep& step, const AttentionClass& layers, Pass pass, Fn&& attend) {
  if (step.clocks == nullptr) return attend();
  SpanClock& clock = step.clocks->Of(layers, pass);
  clock.Begin(ctx.stream());
  const absl::Status status = attend();
  clock.End(ctx.stream());
  return status;
}

}  // namespace annulus
