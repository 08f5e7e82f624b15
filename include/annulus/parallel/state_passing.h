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
// backward the same runs from the end: the gradient of a segment's end state, from what follows.
//
//   zigzag, P = 2:   segment  0 1 2 3        start state of 2 = T1(S0) + S1
//                    rank     0 1 1 0
//
// Few ranks gather all summaries (one collective, and each advances through what precedes its segments); many
// scan in log2 steps of one message each (Hillis and Steele, 1986). The bytes sent do not depend on the
// sequence's length.

#include <vector>

#include "annulus/ops/state.h"
#include "annulus/parallel/attention_geometry.h"

namespace annulus {

// InvalidArgument for a layout whose rows are not runs of consecutive positions: striped over several ranks.
absl::Status CheckSegments(LayoutKind layout, int cp_ranks);

// Rows of this rank's segments.
std::vector<RowRange> SegmentsOf(AttentionGeometry& geometry);

enum class StateOrder { kForward, kBackward };  // from earlier to later segments, or the other way round
enum class StateMethod { kAuto, kGather, kScan };
// Gathering moves all other segments' states past each rank, the scan log2 of their number; up to so many
// ranks one collective is the faster: kAuto.
inline constexpr int kMostGatheringRanks = 8;

// One exchange of states; its memory is of ctx.scratch.
class StatePassing {
 public:
  // Starts to exchange `summary`. Collective over geometry.cp().
  static absl::StatusOr<StatePassing> Start(Context& ctx, AttentionGeometry& geometry, StateOrder order,
                                            const SegmentSummary& summary,
                                            StateMethod method = StateMethod::kAuto);
  // incoming: as summary.state, overwritten by the state at the start of each local segment; with kBackward
  // by the gradient of the state at its end.
  absl::Status Finish(Context& ctx, TensorRef incoming);

  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  struct Message {
    int source = 0, target = 0;  // places in the chain
  };
  SegmentSummary Piece(TensorRef memory, int64_t index) const;
  int64_t own_pieces() const;
  absl::Status StartRound();
  absl::Status FinishGather(Context& ctx, TensorRef incoming);
  absl::Status FinishScan(Context& ctx, TensorRef incoming);
  absl::Status Combine(Context& ctx, TensorRef current, int64_t index);
  absl::Status Take(Context& ctx, TensorRef incoming);
  absl::Status Wait(Context& ctx);

  AttentionGeometry* geometry_ = nullptr;
  StateOrder order_ = StateOrder::kForward;
  Shape transition_, state_;       // of one segment
  TensorRef own_, all_, arrived_;  // packed: of each piece the transition, then the state
  bool scan_ = false;
  int distance_ = 1;
  std::vector<Request> requests_;
  int64_t bytes_sent_ = 0;
};

// The `width` rows before each local segment, from wherever they are; zeros before the first position.
class HaloExchange {
 public:
  // edges: [segments, width, batch, columns], the last rows of each local segment; where a segment has fewer,
  // those before are not read.   halo: the same shape, overwritten by Finish. Collective over geometry.cp().
  static absl::StatusOr<HaloExchange> Start(Context& ctx, AttentionGeometry& geometry, ConstTensorRef edges,
                                            TensorRef halo);
  // The adjoint: dedges (overwritten by Finish) = the sum of what the halos of later segments hold of each
  // row.
  static absl::StatusOr<HaloExchange> StartBackward(Context& ctx, AttentionGeometry& geometry,
                                                    ConstTensorRef dhalo, TensorRef dedges);
  absl::Status Finish(Context& ctx);

  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  absl::Status Flush();

  std::vector<Request> requests_;
  std::vector<std::pair<TensorRef, TensorRef>> sums_;  // the first is added to the second
  int64_t bytes_sent_ = 0;
};

// What the rank that sends most sends: summaries of so many bytes a segment; so many rows before each
// segment, kBackward their gradients.
int64_t StateBytesSent(const SequenceLayout& layout, StateOrder order, int64_t summary_bytes);
int64_t HaloBytesSent(const SequenceLayout& layout, StateOrder order, int64_t width, int64_t row_bytes);

}  // namespace annulus
