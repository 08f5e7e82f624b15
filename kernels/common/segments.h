#pragma once

// Rows of a rank as segments of consecutive positions, cut into chunks from the first row of each: what the
// ops of recurrent layers share.

#include <algorithm>
#include <numeric>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "annulus/base/row_range.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"

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

enum class ChunkOrder { kFromFirst, kFromLast };

struct ChunkWalk {
  absl::Span<const RowRange> segments;
  int64_t chunk = 1;
  int64_t heads = 0;  // of all items of a batch
  ChunkOrder order = ChunkOrder::kFromFirst;
};

// Calls fn(segment, head, indices in ChunksOf of the segment's chunks, in order) for all; polls after each.
template <typename Fn>
void ForEachSegmentHead(const Context& ctx, const ChunkWalk& walk, Fn&& fn) {
  int64_t first = 0;
  for (size_t s = 0; s < walk.segments.size(); ++s) {
    std::vector<int64_t> chunks(static_cast<size_t>(CountChunks(walk.segments.subspan(s, 1), walk.chunk)));
    std::iota(chunks.begin(), chunks.end(), first);
    first += static_cast<int64_t>(chunks.size());
    if (walk.order == ChunkOrder::kFromLast) std::reverse(chunks.begin(), chunks.end());
    for (int64_t head = 0; head < walk.heads; ++head) {
      fn(static_cast<int64_t>(s), head, chunks);
      ctx.Poll();
    }
  }
}

}  // namespace annulus::kernels
