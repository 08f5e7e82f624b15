// Rows before segments. A halo of `width` rows comes from as many segments before as are needed: with rows L
// of a segment, rows [width - k L, width - (k - 1) L) of the halo are rows of the segment k places before,
// where they end at row width of its edges.

#include <algorithm>

#include "annulus/ops/elementwise.h"
#include "annulus/parallel/state_passing.h"
#include "segment_chain.h"

namespace annulus {
namespace {

struct HaloPiece {
  SegmentChain::Segment source, target;
  RowRange edge_rows = {}, halo_rows = {};
  int back = 1;  // places between them
};

// In the order in which both ends post their messages.
std::vector<HaloPiece> PiecesOf(const SequenceLayout& layout, int64_t width) {
  const SegmentChain chain(layout);
  const int64_t rows = layout.local_rows() / chain.per_rank();
  std::vector<HaloPiece> pieces;
  for (int place = 0; place < chain.size(); ++place) {
    for (int back = 1; (back - 1) * rows < width && back <= place; ++back) {
      HaloPiece piece{.source = chain.At(place - back), .target = chain.At(place), .back = back};
      piece.halo_rows = {std::max<int64_t>(0, width - back * rows), width - (back - 1) * rows};
      piece.edge_rows = {piece.halo_rows.begin + (back - 1) * rows, width};
      pieces.push_back(piece);
    }
  }
  return pieces;
}

template <typename Ref>
Ref RowsOf(const Ref& tensor, int segment, const RowRange& rows) {
  const Ref one = tensor.Rows(segment, segment + 1);
  return one.Reshaped({tensor.dim(1), tensor.dim(2), tensor.dim(3)}).Rows(rows.begin, rows.end);
}

}  // namespace

absl::StatusOr<HaloExchange> HaloExchange::Start(Context& ctx, AttentionGeometry& geometry,
                                                 ConstTensorRef edges, TensorRef halo) {
  ANNULUS_RETURN_IF_ERROR(CheckSegments(geometry.layout().kind(), geometry.cp().size()));
  HaloExchange exchange;
  Communicator& cp = geometry.cp();
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, halo));
  for (const HaloPiece& piece : PiecesOf(geometry.layout(), edges.dim(1))) {
    const bool sends = piece.source.cp_rank == cp.rank(), receives = piece.target.cp_rank == cp.rank();
    if (!sends && !receives) continue;
    if (sends && receives) {
      ANNULUS_RETURN_IF_ERROR(Copy(ctx, RowsOf(edges, piece.source.index, piece.edge_rows),
                                   RowsOf(halo, piece.target.index, piece.halo_rows)));
    } else if (sends) {
      const ConstTensorRef rows = RowsOf(edges, piece.source.index, piece.edge_rows);
      ANNULUS_ASSIGN_OR_RETURN(Request request, cp.Send(rows, piece.target.cp_rank, piece.target.index));
      exchange.requests_.push_back(std::move(request));
      exchange.bytes_sent_ += rows.bytes();
    } else {
      const TensorRef rows = RowsOf(halo, piece.target.index, piece.halo_rows);
      ANNULUS_ASSIGN_OR_RETURN(Request request, cp.Receive(rows, piece.source.cp_rank, piece.target.index));
      exchange.requests_.push_back(std::move(request));
    }
  }
  ANNULUS_RETURN_IF_ERROR(exchange.Flush());
  return exchange;
}

absl::StatusOr<HaloExchange> HaloExchange::StartBackward(Context& ctx, AttentionGeometry& geometry,
                                                         ConstTensorRef dhalo, TensorRef dedges) {
  HaloExchange exchange;
  Communicator& cp = geometry.cp();
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, dedges));
  for (const HaloPiece& piece : PiecesOf(geometry.layout(), dhalo.dim(1))) {
    const bool sends = piece.target.cp_rank == cp.rank(), receives = piece.source.cp_rank == cp.rank();
    if (sends && !receives) {
      const ConstTensorRef rows = RowsOf(dhalo, piece.target.index, piece.halo_rows);
      ANNULUS_ASSIGN_OR_RETURN(Request request, cp.Send(rows, piece.source.cp_rank, piece.target.index));
      exchange.requests_.push_back(std::move(request));
      exchange.bytes_sent_ += rows.bytes();
    } else if (receives) {
      const TensorRef rows = RowsOf(dedges, piece.source.index, piece.edge_rows);
      const TensorRef summand = ctx.scratch.Allocate(rows.dtype(), rows.shape());
      if (sends) {
        ANNULUS_RETURN_IF_ERROR(Copy(ctx, RowsOf(dhalo, piece.target.index, piece.halo_rows), summand));
      } else {
        ANNULUS_ASSIGN_OR_RETURN(Request request,
                                 cp.Receive(summand, piece.target.cp_rank, piece.target.index));
        exchange.requests_.push_back(std::move(request));
      }
      exchange.sums_.emplace_back(summand, rows);
    }
  }
  ANNULUS_RETURN_IF_ERROR(exchange.Flush());
  return exchange;
}

// Messages that are collected until somebody asks for them go out now.
absl::Status HaloExchange::Flush() {
  for (Request& request : requests_) {
    if (!request.done()) ANNULUS_RETURN_IF_ERROR(request.Test().status());
  }
  return absl::OkStatus();
}

absl::Status HaloExchange::Finish(Context& ctx) {
  absl::Status status;
  if (!requests_.empty()) {
    ctx.waits.Begin(WaitKind::kExchange, ctx.stream());
    for (Request& request : requests_) status.Update(request.Wait());
    ctx.waits.End(WaitKind::kExchange, ctx.stream());
    requests_.clear();
  }
  ANNULUS_RETURN_IF_ERROR(status);
  for (const auto& [summand, rows] : sums_) ANNULUS_RETURN_IF_ERROR(AddInPlace(ctx, summand, rows));
  return absl::OkStatus();
}

int64_t HaloBytesSent(const SequenceLayout& layout, StateOrder order, int64_t width, int64_t row_bytes) {
  std::vector<int64_t> rows(static_cast<size_t>(layout.ranks()));
  for (const HaloPiece& piece : PiecesOf(layout, width)) {
    if (piece.source.cp_rank == piece.target.cp_rank) continue;
    const int sender = order == StateOrder::kForward ? piece.source.cp_rank : piece.target.cp_rank;
    rows[static_cast<size_t>(sender)] += piece.halo_rows.size();
  }
  return *std::max_element(rows.begin(), rows.end()) * row_bytes;
}

}  // namespace annulus
