#pragma once

// States of recurrent layers and their transitions, for handing them from one part of a sequence to the next.
// All in the accumulator dtype; batch * heads counts heads of an item, then items.

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/transpose.h"

namespace annulus {

// Of each segment of a rank: its end state is transition(start state) + state.
//   state:      [segments, batch * heads, K, V]
//   transition: [segments, batch * heads]        each state is scaled, or
//               [segments, batch * heads, K * K]  each state is multiplied from the left by a K x K matrix
struct SegmentSummary {
  TensorRef transition, state;
};

// out = transition(in) + state, for the segments of all of them; `in` undefined: zero. out may be in or
// state. kYes: with the transposed matrix, as gradients go.
absl::Status AdvanceState(Context& ctx, ConstTensorRef transition, Transpose transpose, ConstTensorRef in,
                          ConstTensorRef state, TensorRef out);

// out = later after earlier: the transition of both (kYes: earlier^T after later^T is formed by the caller
// exchanging the two). out is neither.
absl::Status ComposeTransitions(Context& ctx, ConstTensorRef later, ConstTensorRef earlier, TensorRef out);

}  // namespace annulus
