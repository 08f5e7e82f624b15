#include "annulus/parallel/sequence_layout.h"

#include <numeric>

#include "annulus/base/check.h"

namespace annulus {

SequenceLayout::SequenceLayout(LayoutKind kind, int64_t length, int ranks, int row_multiple)
    : kind_(kind), length_(length), ranks_(ranks) {
  ANNULUS_CHECK(length >= 1 && ranks >= 1 && row_multiple >= 1)
      << "length " << length << ", ranks " << ranks << ", row multiple " << row_multiple;
  const int64_t chunks_per_rank = kind == LayoutKind::kZigzag && ranks > 1 ? 2 : 1;
  const int64_t unit = std::lcm<int64_t>(chunks_per_rank, row_multiple), pieces = unit * ranks;
  local_rows_ = (length + pieces - 1) / pieces * unit;
}

std::vector<LayoutChunk> SequenceLayout::chunks(int cp_rank) const {
  ANNULUS_CHECK(0 <= cp_rank && cp_rank < ranks_);
  if (kind_ == LayoutKind::kStriped) return {{0, local_rows_, cp_rank, ranks_}};
  if (kind_ == LayoutKind::kContiguous || ranks_ == 1) return {{0, local_rows_, cp_rank * local_rows_, 1}};
  const int64_t half = local_rows_ / 2;
  return {{0, half, cp_rank * half, 1}, {half, half, (2 * ranks_ - 1 - cp_rank) * half, 1}};
}

SequenceLayout::Place SequenceLayout::PlaceOf(int64_t position) const {
  ANNULUS_CHECK(0 <= position && position < padded_length()) << position;
  if (kind_ == LayoutKind::kStriped) return {static_cast<int>(position % ranks_), position / ranks_};
  if (kind_ == LayoutKind::kContiguous || ranks_ == 1)
    return {static_cast<int>(position / local_rows_), position % local_rows_};
  const int64_t half = local_rows_ / 2;
  const int64_t chunk = position / half;
  if (chunk < ranks_) return {static_cast<int>(chunk), position % half};
  return {static_cast<int>(2 * ranks_ - 1 - chunk), half + position % half};
}

int64_t SequenceLayout::PositionOf(int cp_rank, int64_t row) const {
  for (const LayoutChunk& chunk : chunks(cp_rank)) {
    if (row < chunk.row + chunk.rows) return chunk.position + chunk.stride * (row - chunk.row);
  }
  ANNULUS_CHECK(false) << "row " << row << " of " << local_rows_;
  return -1;
}

std::vector<int64_t> SequenceLayout::LocalPositions(int cp_rank) const {
  std::vector<int64_t> positions;
  positions.reserve(static_cast<size_t>(local_rows_));
  for (const LayoutChunk& chunk : chunks(cp_rank)) {
    for (int64_t i = 0; i < chunk.rows; ++i) positions.push_back(chunk.position + chunk.stride * i);
  }
  return positions;
}

}  // namespace annulus
