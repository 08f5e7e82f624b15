#pragma once

// Rows of a rank as segments of consecutive positions, cut into chunks from the first row of each: what the
// ops of recurrent layers share.

#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "annulus/base/row_range.h"
#include "annulus/base/status.h"

namespace annulus::kernels {

// In order and together rows [0, rows). Segments may be empty.
absl::Status CheckSegments(absl::string_view name, absl::Span<const RowRange> segments, int64_t rows);

struct SegmentChunk {
  RowRange rows;
  int64_t segment = 0;
};
// In the order of rows; an empty segment has none. chunk: rows of all but a segment's last, at least 1.
std::vector<SegmentChunk> ChunksOf(absl::Span<const RowRange> segments, int64_t chunk);

// ChunksOf(...).size()
int64_t CountChunks(absl::Span<const RowRange> segments, int64_t chunk);

// Calls fn(first, last) with the chunks of each segment, [first, last) of ChunksOf, in order.
template <typename Fn>
void ForEachSegment(absl::Span<const RowRange> segments, int64_t chunk, Fn&& fn) {
  int64_t first = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const int64_t count = CountChunks(segments.subspan(s, 1), chunk);
    fn(static_cast<int64_t>(s), first, first + count);
    first += count;
  }
}

}  // namespace annulus::kernels
