#pragma once

// The scan of a state-space layer over a sequence that is split over ranks: chunk states, the exchange of
// segment states, output; and back. A product of the layer that knows nothing of states runs while they
// travel: of its gate or queries in forward, of its output's weights in backward.
//
// The work inside chunks is not what hides them. One kernel makes y of it and of the states at the start of
// chunks, which all depend on what arrives: to begin before, it would have to be followed by a second pass
// over y and over those states. With 80 heads of 64, a state of 128 and a width of 2560, at 8192 tokens a rank
// that pass moves 0.34 GB, some 80 us at the memory of an H200, and more with every token; what travels is
// 5 MB to each other rank whatever the length, and the gate's product is 0.2 TFLOP, some 270 us.

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
