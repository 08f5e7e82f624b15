#pragma once

// The scan of state-space layers with a scalar decay for each head (SSD: Dao and Gu, 2024, section 6), of
// which linear attention is the case b = k, c = q, x = v:
//
//   h_t = e^{a_t} h_{t-1} + dt_t x_t b_t^T   [head_dim, state]        y_t = h_t c_t + skip x_t
//
// a_t <= 0; h_{t-1} counts as 0 where ages[t] = 0: a document starts. Computed in chunks of consecutive
// rows: inside a chunk by products of matrices, between chunks through their states. Segments are runs of
// consecutive positions, cut into chunks from their first row. The calls of a layer, in order:
//
//   SsdChunkStates          end state of each chunk from nothing; summary of each segment. Reads x, b, dt, a
//   (hand the summaries along the sequence: annulus/parallel/state_passing.h)
//   SsdForward              states at the start of chunks in place of those; y
//   SsdBackwardChunkStates  gradient of each chunk's start state from its own y; summary of each segment
//   (hand them back from the end)
//   SsdBackward             gradients

#include <vector>

#include "annulus/base/row_range.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/state.h"

namespace annulus {

struct Ssd {
  ConstHeadsRef x;                 // [rows, batch, heads, head_dim], compute dtype
  ConstHeadsRef b, c;              // [rows, batch, groups, state]: head h reads group h groups / heads
  ConstTensorRef dt;               // [rows, batch, heads], accumulator dtype; undefined: 1
  ConstTensorRef a;                // [rows, batch, heads], accumulator dtype: logarithm of the decay
  ConstTensorRef skip;             // [heads], accumulator dtype; undefined: 0
  ConstTensorRef ages;             // i32 [rows, batch]: tokens of the same document before this one
  std::vector<RowRange> segments;  // in order, together all rows
  int64_t chunk = 128;
};

// Chunks of all segments together.
int64_t SsdChunks(const Ssd& ssd);

// Memory between the calls, in the accumulator dtype: [chunks, batch * heads, state, head_dim], and the log
// of each chunk's decay, -inf where a document starts in it: [chunks, batch * heads]. Heads of an item are
// next to each other.
struct SsdStates {
  TensorRef states, decays;
};

// states: the end state of each chunk from nothing. summary: decay (not its logarithm) and end state of each
// segment.   summary.transition: [segments, batch * heads], .state: [segments, batch * heads, state,
// head_dim]
absl::Status SsdChunkStates(Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary);

// initial: state at the start of each segment, as summary.state; undefined: zero. states.states: from what
// SsdChunkStates left to the state at the start of each chunk.   y: as x, overwritten
absl::Status SsdForward(Context& ctx, const Ssd& ssd, ConstTensorRef initial, const SsdStates& states,
                        HeadsRef y);

// The same from the end: gradients of states at the start of each chunk from the chunk's own dy, and their
// summary: the gradient of each segment's start state where nothing comes from later ones.
//   gradients.states: as states.states; decays of SsdStates are read
absl::Status SsdBackwardChunkStates(Context& ctx, const Ssd& ssd, ConstHeadsRef dy, const SsdStates& states,
                                    TensorRef gradients, const SegmentSummary& summary);

// states: as SsdForward left them. gradients: as SsdBackwardChunkStates left them; used up.
// final_gradient: gradient of each segment's end state from later segments; undefined: zero.
struct SsdGradients {
  HeadsRef dx;        // as x, overwritten
  HeadsRef db, dc;    // as b and c, overwritten: sums over the heads of a group
  TensorRef ddt, da;  // as dt and a, overwritten; ddt undefined where dt is
  TensorRef dskip;    // [heads], accumulator dtype, added to; undefined where skip is
};
absl::Status SsdBackward(Context& ctx, const Ssd& ssd, ConstHeadsRef dy, const SsdStates& states,
                         TensorRef gradients, ConstTensorRef final_gradient, const SsdGradients& out);

}  // namespace annulus
