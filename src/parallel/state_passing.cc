#include "annulus/parallel/state_passing.h"

#include <algorithm>

#include "annulus/ops/elementwise.h"
#include "segment_chain.h"

namespace annulus {
namespace {

// Rows [begin, end) of the first dimension, without it.
template <typename Ref>
Ref Index(const Ref& tensor, int64_t i) {
  const Ref rows = tensor.Rows(i, i + 1);
  return rows.Reshaped(Shape(rows.shape().dims().subspan(1)));
}

Shape WithLeadingOne(const Shape& shape) {
  std::vector<int64_t> dims = {1};
  dims.insert(dims.end(), shape.dims().begin(), shape.dims().end());
  return Shape(dims);
}

}  // namespace

absl::Status CheckSegments(LayoutKind layout, int cp_ranks) {
  if (layout != LayoutKind::kStriped || cp_ranks == 1) return absl::OkStatus();
  return Invalid(
      "parallel.layout=STRIPED: state-space layers hand their states from one run of consecutive positions "
      "to "
      "the next; expected ZIGZAG or CONTIGUOUS");
}

std::vector<RowRange> SegmentsOf(AttentionGeometry& geometry) {
  std::vector<RowRange> segments;
  for (const LayoutChunk& chunk : geometry.layout().chunks(geometry.cp().rank())) {
    segments.push_back({chunk.row, chunk.row + chunk.rows});
  }
  return segments;
}

// Summaries are packed one behind the other, so that each is one message.
SegmentSummary StatePassing::Piece(TensorRef memory, int64_t index) const {
  const int64_t transition = transition_.elements(), state = state_.elements();
  const TensorRef piece = memory.Rows(index * (transition + state), (index + 1) * (transition + state));
  return {.transition = piece.Rows(0, transition).Reshaped(WithLeadingOne(transition_)),
          .state = piece.Rows(transition, transition + state).Reshaped(WithLeadingOne(state_))};
}

int64_t StatePassing::own_pieces() const { return SegmentChain(geometry_->layout()).per_rank(); }

absl::StatusOr<StatePassing> StatePassing::Start(Context& ctx, AttentionGeometry& geometry, StateOrder order,
                                                 const SegmentSummary& summary, StateMethod method) {
  ANNULUS_RETURN_IF_ERROR(CheckSegments(geometry.layout().kind(), geometry.cp().size()));
  StatePassing passing;
  passing.geometry_ = &geometry;
  passing.order_ = order;
  passing.transition_ = Index(summary.transition, 0).shape();
  passing.state_ = Index(summary.state, 0).shape();
  const int64_t pieces = passing.own_pieces(), ranks = geometry.cp().size();
  const int64_t elements = passing.transition_.elements() + passing.state_.elements();
  ANNULUS_CHECK(summary.state.dim(0) == pieces) << ToString(summary.state.shape());
  passing.scan_ =
      method == StateMethod::kScan || (method == StateMethod::kAuto && ranks > kMostGatheringRanks);

  const DType dtype = summary.state.dtype();
  if (passing.scan_) {
    passing.own_ = ctx.scratch.Allocate(dtype, {pieces * elements});
    passing.arrived_ = ctx.scratch.Allocate(dtype, {pieces * elements});
  } else {
    passing.all_ = ctx.scratch.Allocate(dtype, {ranks * pieces * elements});
    const int64_t mine = geometry.cp().rank() * pieces * elements;
    passing.own_ = passing.all_.Rows(mine, mine + pieces * elements);
  }
  for (int64_t i = 0; i < pieces; ++i) {
    const SegmentSummary piece = passing.Piece(passing.own_, i);
    ANNULUS_RETURN_IF_ERROR(Copy(ctx, summary.transition.Rows(i, i + 1), piece.transition));
    ANNULUS_RETURN_IF_ERROR(Copy(ctx, summary.state.Rows(i, i + 1), piece.state));
  }
  if (passing.scan_) {
    ANNULUS_RETURN_IF_ERROR(passing.StartRound());
  } else if (ranks > 1) {
    ANNULUS_ASSIGN_OR_RETURN(Request request, geometry.cp().IAllGather(passing.own_, passing.all_));
    passing.requests_.push_back(std::move(request));
    passing.bytes_sent_ = passing.own_.bytes() * (ranks - 1);
  }
  return passing;
}

absl::Status StatePassing::Finish(Context& ctx, TensorRef incoming) {
  return scan_ ? FinishScan(ctx, incoming) : FinishGather(ctx, incoming);
}

absl::Status StatePassing::Wait(Context& ctx) {
  if (requests_.empty()) return absl::OkStatus();
  ctx.waits.Begin(WaitKind::kExchange, ctx.stream());
  absl::Status status;
  for (Request& request : requests_) status.Update(request.Wait());
  ctx.waits.End(WaitKind::kExchange, ctx.stream());
  requests_.clear();
  return status;
}

absl::Status StatePassing::FinishGather(Context& ctx, TensorRef incoming) {
  ANNULUS_RETURN_IF_ERROR(Wait(ctx));
  const SegmentChain chain(geometry_->layout());
  const int cp_rank = geometry_->cp().rank();
  ConstTensorRef state;  // behind the segments so far; undefined before the first
  for (int i = 0; i < chain.size(); ++i) {
    const int place = order_ == StateOrder::kForward ? i : chain.size() - 1 - i;
    const SegmentChain::Segment segment = chain.At(place);
    if (segment.cp_rank == cp_rank) {
      const TensorRef to = incoming.Rows(segment.index, segment.index + 1);
      ANNULUS_RETURN_IF_ERROR(state.defined() ? Copy(ctx, state, to) : Zero(ctx, to));
    }
    const SegmentSummary piece = Piece(all_, segment.cp_rank * chain.per_rank() + segment.index);
    ANNULUS_RETURN_IF_ERROR(AdvanceState(ctx, piece.transition,
                                         order_ == StateOrder::kForward ? Transpose::kNo : Transpose::kYes,
                                         state, piece.state, piece.state));
    state = piece.state;
  }
  return absl::OkStatus();
}

// Every segment sends what it has of the segments behind it to the one `distance_` ahead. Between two ranks
// messages come in the order of the chain.
absl::Status StatePassing::StartRound() {
  const SegmentChain chain(geometry_->layout());
  const int64_t elements = transition_.elements() + state_.elements();
  const int cp_rank = geometry_->cp().rank();
  const auto place = [&](int i) { return order_ == StateOrder::kForward ? i : chain.size() - 1 - i; };
  for (int i = 0; i + distance_ < chain.size(); ++i) {
    const SegmentChain::Segment from = chain.At(place(i)), to = chain.At(place(i + distance_));
    const TensorRef sent = own_.Rows(from.index * elements, (from.index + 1) * elements);
    const TensorRef received = arrived_.Rows(to.index * elements, (to.index + 1) * elements);
    if (from.cp_rank == to.cp_rank) continue;
    if (from.cp_rank == cp_rank) {
      ANNULUS_ASSIGN_OR_RETURN(Request request, geometry_->cp().Send(sent, to.cp_rank, from.index));
      requests_.push_back(std::move(request));
      bytes_sent_ += sent.bytes();
    } else if (to.cp_rank == cp_rank) {
      ANNULUS_ASSIGN_OR_RETURN(Request request, geometry_->cp().Receive(received, from.cp_rank, from.index));
      requests_.push_back(std::move(request));
    }
  }
  return absl::OkStatus();
}

// own = own after arrived, in the direction of the chain.
absl::Status StatePassing::Combine(Context& ctx, TensorRef current, int64_t index) {
  const SegmentSummary own = Piece(own_, index), before = Piece(current, index);
  const bool forward = order_ == StateOrder::kForward;
  ANNULUS_RETURN_IF_ERROR(AdvanceState(ctx, own.transition, forward ? Transpose::kNo : Transpose::kYes,
                                       before.state, own.state, own.state));
  ArenaScope scope(ctx.scratch);
  const TensorRef both = ctx.scratch.Allocate(own.transition.dtype(), own.transition.shape());
  ANNULUS_RETURN_IF_ERROR(forward ? ComposeTransitions(ctx, own.transition, before.transition, both)
                                  : ComposeTransitions(ctx, before.transition, own.transition, both));
  return Copy(ctx, both, own.transition);
}

absl::Status StatePassing::FinishScan(Context& ctx, TensorRef incoming) {
  const SegmentChain chain(geometry_->layout());
  const int64_t elements = transition_.elements() + state_.elements();
  const auto step_of = [&](int index) {  // how many segments the chain has before this one
    const int place = chain.PlaceOf({geometry_->cp().rank(), index});
    return order_ == StateOrder::kForward ? place : chain.size() - 1 - place;
  };
  // The piece that a segment of this rank gets from `distance` before it, if it is on this rank too.
  const auto local_source = [&](int index, int distance) {
    const int other = 1 - index;
    return chain.per_rank() == 2 && step_of(index) - step_of(other) == distance ? other : -1;
  };
  const auto take_local = [&](int distance) -> absl::Status {
    for (int i = 0; i < chain.per_rank(); ++i) {
      const int source = local_source(i, distance);
      if (source < 0) continue;
      ANNULUS_RETURN_IF_ERROR(Copy(ctx, own_.Rows(source * elements, (source + 1) * elements),
                                   arrived_.Rows(i * elements, (i + 1) * elements)));
    }
    return absl::OkStatus();
  };
  for (; distance_ < chain.size(); distance_ *= 2) {
    if (distance_ > 1) ANNULUS_RETURN_IF_ERROR(StartRound());
    ANNULUS_RETURN_IF_ERROR(take_local(distance_));
    ANNULUS_RETURN_IF_ERROR(Wait(ctx));
    for (int i = 0; i < chain.per_rank(); ++i) {
      if (step_of(i) >= distance_) ANNULUS_RETURN_IF_ERROR(Combine(ctx, arrived_, i));
    }
  }
  // What is behind a segment is what the one before it has now.
  distance_ = 1;
  ANNULUS_RETURN_IF_ERROR(StartRound());
  ANNULUS_RETURN_IF_ERROR(take_local(distance_));
  ANNULUS_RETURN_IF_ERROR(Wait(ctx));
  for (int i = 0; i < chain.per_rank(); ++i) {
    const TensorRef to = incoming.Rows(i, i + 1);
    ANNULUS_RETURN_IF_ERROR(step_of(i) == 0 ? Zero(ctx, to) : Copy(ctx, Piece(arrived_, i).state, to));
  }
  return absl::OkStatus();
}

int64_t StateBytesSent(const SequenceLayout& layout, StateOrder order, int64_t summary_bytes) {
  const SegmentChain chain(layout);
  const int64_t ranks = layout.ranks();
  if (ranks <= kMostGatheringRanks) return chain.per_rank() * (ranks - 1) * summary_bytes;
  std::vector<int64_t> messages(static_cast<size_t>(ranks));
  const auto round = [&](int distance) {
    for (int i = 0; i + distance < chain.size(); ++i) {
      const auto rank_at = [&](int place) {
        return chain.At(order == StateOrder::kForward ? place : chain.size() - 1 - place).cp_rank;
      };
      if (rank_at(i) != rank_at(i + distance)) ++messages[static_cast<size_t>(rank_at(i))];
    }
  };
  for (int distance = 1; distance < chain.size(); distance *= 2) round(distance);
  round(1);  // what is behind a segment is what the one before it has in the end
  return *std::max_element(messages.begin(), messages.end()) * summary_bytes;
}

}  // namespace annulus
