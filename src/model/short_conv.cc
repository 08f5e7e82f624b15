#include "short_conv.h"

#include <algorithm>

#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"

namespace annulus {
namespace {

// Rows of a halo, or of edges, as the batch's rows are.
TensorRef AsRows(TensorRef halo) {
  return halo.Reshaped({halo.dim(0) * halo.dim(1), halo.dim(2), halo.dim(3)});
}

}  // namespace

ShortConv::ShortConv(std::vector<ConvPart> parts) : parts_(std::move(parts)) {
  for (const ConvPart& part : parts_) channels_ += part.channels();
  width_ = parts_.front().w.dim(1) - 1;
}

TensorRef ShortConv::AllocateHalo(Arena& arena, ModelStep& step, DType dtype) const {
  const int64_t segments = static_cast<int64_t>(SegmentsOf(step.geometry).size());
  return arena.Allocate(dtype, {segments, width_, step.batch(), channels_});
}

// Alone on its sequence a rank has nothing before its first row.
absl::StatusOr<HaloExchange> ShortConv::StartHalo(Context& ctx, ModelStep& step, ConstTensorRef x,
                                                  const Projection& project, TensorRef halo) const {
  if (width_ == 0 || step.geometry.cp().size() == 1) {
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, halo));
    return HaloExchange();
  }
  const std::vector<RowRange> segments = SegmentsOf(step.geometry);
  const int64_t d = x.dim(x.rank() - 1);
  const ConstTensorRef rows = x.Reshaped({step.rows(), step.batch(), d});
  const TensorRef last = ctx.scratch.Allocate(x.dtype(), {halo.dim(0) * width_, step.batch(), d});
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, last));
  for (size_t s = 0; s < segments.size(); ++s) {
    const int64_t count = std::min(width_, segments[s].size()), end = static_cast<int64_t>(s + 1) * width_;
    ANNULUS_RETURN_IF_ERROR(
        Copy(ctx, rows.Rows(segments[s].end - count, segments[s].end), last.Rows(end - count, end)));
  }
  const TensorRef edges = ctx.scratch.Allocate(x.dtype(), halo.shape());
  ANNULUS_RETURN_IF_ERROR(project(last, AsRows(edges)));
  ANNULUS_ASSIGN_OR_RETURN(HaloExchange exchange, HaloExchange::Start(ctx, step.geometry, edges, halo));
  step.AddStateBytes(exchange.bytes_sent());
  return exchange;
}

Conv1d ShortConv::ConvOf(Context& ctx, ModelStep& step, const ConvPart& part, ConstTensorRef halo) const {
  return {.w = part.w,
          .bias = part.bias,
          .ages = step.geometry.Ages(ctx),
          .segments = SegmentsOf(step.geometry),
          .halo = halo};
}

// The part's own columns of the halo, on their own.
absl::StatusOr<TensorRef> ShortConv::HaloOf(Context& ctx, TensorRef halo, int64_t begin,
                                            const ConvPart& part) const {
  if (part.channels() == channels_) return halo;
  const TensorRef own =
      ctx.scratch.Allocate(halo.dtype(), {halo.dim(0), width_, halo.dim(2), part.channels()});
  ANNULUS_RETURN_IF_ERROR(
      MoveColumns(ctx, AsRows(halo), {{begin, 0, part.channels()}}, Write::kOverwrite, AsRows(own)));
  return own;
}

absl::Status ShortConv::Forward(Context& ctx, ModelStep& step, TensorRef proj, TensorRef halo,
                                TensorRef out) const {
  int64_t begin = 0;
  for (const ConvPart& part : parts_) {
    ArenaScope scope(ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef own, HaloOf(ctx, halo, begin, part));
    ANNULUS_RETURN_IF_ERROR(Conv1dForward(ctx, ConvOf(ctx, step, part, own),
                                          HeadsOf(proj, begin, 1, part.channels()),
                                          HeadsOf(out, begin, 1, part.channels())));
    begin += part.channels();
  }
  return absl::OkStatus();
}

absl::Status ShortConv::Backward(Context& ctx, ModelStep& step, TensorRef proj, TensorRef halo,
                                 TensorRef dout, const Meanwhile& meanwhile, TensorRef dproj) const {
  ArenaScope scope(ctx.scratch);
  const TensorRef dhalo = ctx.scratch.Allocate(halo.dtype(), halo.shape());
  int64_t begin = 0;
  for (const ConvPart& part : parts_) {
    ANNULUS_ASSIGN_OR_RETURN(const TensorRef own, HaloOf(ctx, halo, begin, part));
    const TensorRef down = ctx.scratch.Allocate(own.dtype(), own.shape());
    ANNULUS_RETURN_IF_ERROR(Conv1dBackward(ctx, ConvOf(ctx, step, part, own),
                                           HeadsOf(proj, begin, 1, part.channels()),
                                           HeadsOf(dout, begin, 1, part.channels()),
                                           {.dx = HeadsOf(dproj, begin, 1, part.channels()),
                                            .dhalo = down,
                                            .dw = part.dw,
                                            .dbias = part.dbias}));
    ANNULUS_RETURN_IF_ERROR(
        MoveColumns(ctx, AsRows(down), {{0, begin, part.channels()}}, Write::kOverwrite, AsRows(dhalo)));
    begin += part.channels();
  }
  return AddHaloGradients(ctx, step, dhalo, meanwhile, dproj);
}

// What later segments' convolutions owe the last rows of this rank's segments.
absl::Status ShortConv::AddHaloGradients(Context& ctx, ModelStep& step, TensorRef dhalo,
                                         const Meanwhile& meanwhile, TensorRef dproj) const {
  if (width_ == 0 || step.geometry.cp().size() == 1) return meanwhile();
  const TensorRef dedges = ctx.scratch.Allocate(dhalo.dtype(), dhalo.shape());
  ANNULUS_ASSIGN_OR_RETURN(HaloExchange exchange,
                           HaloExchange::StartBackward(ctx, step.geometry, dhalo, dedges));
  step.AddStateBytes(exchange.bytes_sent());
  const absl::Status other = meanwhile();
  ANNULUS_RETURN_IF_ERROR(exchange.Finish(ctx));
  ANNULUS_RETURN_IF_ERROR(other);
  const TensorRef edges = AsRows(dedges);
  int64_t end = 0;
  for (const RowRange& segment : SegmentsOf(step.geometry)) {
    end += width_;
    const int64_t count = std::min(width_, segment.size());
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, edges.Rows(end - count, end), {{0, 0, channels_}},
                                        Write::kAccumulate, dproj.Rows(segment.end - count, segment.end)));
  }
  return absl::OkStatus();
}

}  // namespace annulus
