#pragma once

// States of recurrent layers handed along a sequence that is split over a context-parallel group, in the
// attention's own layout: nothing is laid out anew.
//
// A rank's rows are segments of consecutive positions (SequenceLayout::chunks): one, with zigzag two. A layer
// first summarises each segment as if it started from nothing,
//
//   state at its end = transition(state at its start) + state(from zero),
//
// the group exchanges summaries, and each rank gets the state at the start of each of its segments. In
// backward the same runs from the end: the gradient of a segment's end state from what follows.
//
//   zigzag, P = 2:   segment  0 1 2 3        start state of 2 = T1(T0(0) + S0) + S1
//                    rank     0 1 1 0
//
// Few ranks gather all summaries (one collective); many scan in log2 steps. Sums are taken in the order of
// positions either way up to association.

#include "annulus/parallel/attention_geometry.h"
#include "annulus/ops/state.h"

namespace annulus {

enum class StateOrder { kForward, kBackward };  // from earlier to later segments, or the other way round
enum class StateMethod { kAuto, kGather, kScan };

class StatePassing {
 public:
  // Rows of this rank's segments.
  static std::vector<RowRange> Segments(const AttentionGeometry& geometry);
  // Unimplemented-free check: InvalidArgument for layouts whose rows are not in runs of consecutive positions
  // (striped, where there are several ranks).
  static absl::Status CheckLayout(LayoutKind layout, int cp_ranks);

  // Starts the exchange of `summary`, which stays as it is until Finish. Collective over geometry.cp().
  static absl::StatusOr<StatePassing> Start(Context& ctx, AttentionGeometry& geometry, StateOrder order,
                                            const SegmentSummary& summary,
                                            StateMethod method = StateMethod::kAuto);
  // incoming: as summary.state: the state at the start of each local segment (kBackward: its gradient at the
  // end of each), overwritten.
  absl::Status Finish(Context& ctx, TensorRef incoming);

  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  AttentionGeometry* geometry_ = nullptr;
  StateOrder order_ = StateOrder::kForward;
  SegmentSummary own_;
  TensorRef gathered_;
  Request request_;
  bool scan_ = false;
  int64_t bytes_sent_ = 0;
};

// The last `width` rows before each local segment, from wherever they are; zeros before the first position.
//   x: [rows, batch, columns]   halo: [segments, width, batch, columns], overwritten
// A segment may be shorter than `width`: then rows of several predecessors. Start posts, Finish waits.
class HaloExchange {
 public:
  // `edges`: the last `width` rows of each local segment, [segments, width, batch, columns]; of a segment that
  // is shorter, the rows before are not read.
  static absl::StatusOr<HaloExchange> Start(Context& ctx, AttentionGeometry& geometry, ConstTensorRef edges,
                                            TensorRef halo);
  absl::Status Finish();
  // The adjoint: dedges (overwritten) = the gradients that the successors' halos hold of these rows.
  static absl::StatusOr<HaloExchange> StartBackward(Context& ctx, AttentionGeometry& geometry,
                                                    ConstTensorRef dhalo, TensorRef dedges);

 private:
  std::vector<Request> requests_;
};

}  // namespace annulus
