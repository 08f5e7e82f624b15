#pragma once

// The scan of a state-space layer over a sequence that is split over ranks: chunk states, the exchange of
// segment states, output; and back. What a layer computes besides goes on while states travel.

#include <functional>

#include "annulus/model/mixer.h"
#include "annulus/ops/ssd.h"
#include "annulus/parallel/state_passing.h"

namespace annulus {

// Kept from forward: the state at the start of each segment, [segments, batch * heads, state, head_dim] in
// the accumulator dtype. With it a recomputation exchanges nothing.
using SegmentStates = TensorRef;
SegmentStates AllocateSegmentStates(Arena& arena, const Ssd& ssd);
SsdStates AllocateStates(Arena& arena, const Ssd& ssd);

using Meanwhile = std::function<absl::Status()>;

// y from x, b, c, ... (overwritten); fills `initial` and `states`. `meanwhile` runs between the start and the
// end of the exchange.
absl::Status ScanForward(Context& ctx, ModelStep& step, const Ssd& ssd, SegmentStates initial,
                         const SsdStates& states, const Meanwhile& meanwhile, HeadsRef y);
// The same from the `initial` that ScanForward filled: nothing is exchanged.
absl::Status ScanAgain(Context& ctx, const Ssd& ssd, SegmentStates initial, const SsdStates& states,
                       HeadsRef y);
// `states` as either left them.
absl::Status ScanBackward(Context& ctx, ModelStep& step, const Ssd& ssd, ConstHeadsRef dy,
                          const SsdStates& states, const Meanwhile& meanwhile, const SsdGradients& out);

}  // namespace annulus
