#pragma once

// The gated delta rule (Yang et al., 2024): for each head, with a state S [key_dim, value_dim],
//
//   S_t = e^{a_t} S_{t-1} + beta_t k_t (v_t - (e^{a_t} S_{t-1})^T k_t)^T        o_t = S_t^T q_t
//
// a_t <= 0; S_{t-1} counts as 0 where ages[t] = 0. k and q have been normalised by the caller. A segment's
// transition is the product of e^{a_t} (I - beta_t k_t k_t^T), a matrix. The calls of a layer are those of
// annulus/ops/ssd.h.

#include <vector>

#include "annulus/base/row_range.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/state.h"

namespace annulus {

struct DeltaRule {
  ConstHeadsRef q, k;         // [rows, batch, heads, key_dim]
  ConstHeadsRef v;            // [rows, batch, heads, value_dim]
  ConstTensorRef beta, a;     // [rows, batch, heads], accumulator dtype
  ConstTensorRef ages;        // i32 [rows, batch]
  std::vector<RowRange> segments;
  int64_t chunk = 64;         // states are kept at the start of so many rows each
};
int64_t DeltaChunks(const DeltaRule& rule);

// summary: transition [segments, batch * heads, K * K] and end state [segments, batch * heads, K, V] of each
// segment from nothing.
absl::Status DeltaSummary(Context& ctx, const DeltaRule& rule, const SegmentSummary& summary);
// initial: state at the start of each segment; undefined: zero. states: [chunks, batch * heads, K, V], the
// states at the start of chunks, kept for backward.   o: as v, overwritten
absl::Status DeltaForward(Context& ctx, const DeltaRule& rule, ConstTensorRef initial, TensorRef states,
                          HeadsRef o);

// summary: transition as DeltaSummary's and gradient of each segment's start state from its own do.
absl::Status DeltaBackwardSummary(Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary);
struct DeltaGradients {
  HeadsRef dq, dk, dv;   // overwritten
  TensorRef dbeta, da;   // overwritten
};
absl::Status DeltaBackward(Context& ctx, const DeltaRule& rule, ConstHeadsRef do_, ConstTensorRef states,
                           ConstTensorRef final_gradient, const DeltaGradients& out);

// y = x / sqrt(sum x^2 + eps) for each head, and its gradient.
absl::Status L2NormForward(Context& ctx, ConstHeadsRef x, double eps, HeadsRef y);
absl::Status L2NormBackward(Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy, HeadsRef dx);

}  // namespace annulus
