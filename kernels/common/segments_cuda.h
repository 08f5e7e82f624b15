#pragma once

// Rows of a rank as segments of consecutive positions, cut into chunks from the first row of each, as kernels
// take them: by value. Included by .cu files too.

#include <cstdint>

namespace annulus::kernels {

inline constexpr int kMaxSegments = 64;

// Segment s holds rows [begin[s], begin[s + 1]) and chunks [first_chunk[s], first_chunk[s + 1]).
struct SegmentTable {
  int count = 0;
  int64_t chunk = 0;  // rows of all but a segment's last
  int64_t begin[kMaxSegments + 1] = {};
  int64_t first_chunk[kMaxSegments + 1] = {};

  int64_t chunks() const { return first_chunk[count]; }
};

#ifdef __CUDACC__
struct ChunkRows {
  int segment = 0;
  int64_t begin = 0, end = 0;                  // rows of the chunk
  int64_t segment_begin = 0, segment_end = 0;  // rows of its segment
  bool first = false, last = false;            // of the segment
};
__device__ inline ChunkRows ChunkAt(const SegmentTable& table, int64_t chunk) {
  ChunkRows rows;
  while (chunk >= table.first_chunk[rows.segment + 1]) ++rows.segment;
  const int64_t index = chunk - table.first_chunk[rows.segment];
  rows.segment_begin = table.begin[rows.segment];
  rows.segment_end = table.begin[rows.segment + 1];
  rows.begin = rows.segment_begin + index * table.chunk;
  rows.end = rows.begin + table.chunk < rows.segment_end ? rows.begin + table.chunk : rows.segment_end;
  rows.first = index == 0;
  rows.last = rows.end == rows.segment_end;
  return rows;
}
#endif

}  // namespace annulus::kernels
