#include "kernels/common/segments.h"

#include <algorithm>

namespace annulus::kernels {

absl::Status CheckSegments(absl::string_view name, absl::Span<const RowRange> segments, int64_t rows) {
  int64_t next = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].begin != next || segments[s].end < next) {
      return Invalid(name, "[", s, "]=[", segments[s].begin, ", ", segments[s].end,
                     "): expected to begin at ", next);
    }
    next = segments[s].end;
  }
  if (next != rows) return Invalid(name, " end at row ", next, ": expected ", rows);
  return absl::OkStatus();
}

std::vector<SegmentChunk> ChunksOf(absl::Span<const RowRange> segments, int64_t chunk) {
  std::vector<SegmentChunk> chunks;
  for (size_t s = 0; s < segments.size(); ++s) {
    for (int64_t begin = segments[s].begin; begin < segments[s].end; begin += chunk) {
      chunks.push_back({{begin, std::min(begin + chunk, segments[s].end)}, static_cast<int64_t>(s)});
    }
  }
  return chunks;
}

int64_t CountChunks(absl::Span<const RowRange> segments, int64_t chunk) {
  int64_t count = 0;
  for (const RowRange& segment : segments) count += (segment.size() + chunk - 1) / chunk;
  return count;
}

}  // namespace annulus::kernels
