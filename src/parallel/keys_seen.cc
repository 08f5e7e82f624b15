#include "keys_seen.h"

#include <algorithm>

namespace annulus {

KeysSeen::KeysSeen(const AttentionCase& layer, const ExchangePlan& plan)
    : layer_(layer), plan_(plan), stride_(layer.layout.chunks(0).front().stride) {}

std::vector<QueryTileKeys> KeysSeen::By(const AttendCall& call, int64_t tile_queries) {
  static const auto& none = *new std::vector<int64_t>();
  const bool general = call.shape == MaskShape::kGeneral;
  const std::vector<int64_t>& positions = general ? PositionsOf(call.queries) : none;
  const int64_t rows = call.q_rows.size();
  std::vector<QueryTileKeys> seen;
  for (int64_t item = 0; item < layer_.sequences.batch; ++item) {
    for (int64_t row = 0; row < rows; row += tile_queries) {
      seen.push_back(OfTile(call, positions, {row, std::min(row + tile_queries, rows)}, item));
    }
  }
  return seen;
}

QueryTileKeys KeysSeen::OfTile(const AttendCall& call, const std::vector<int64_t>& positions,
                               const RowRange& queries, int64_t item) const {
  if (call.shape == MaskShape::kFull) return {0, call.keys.size()};
  if (call.shape == MaskShape::kCausal) return {0, queries.end};
  // Positions ascend with the rows, and so does what is seen from them.
  const auto keys_of = [&](int64_t row) {
    return VisibleKeys(layer_.sequences, layer_.window, item,
                       positions[static_cast<size_t>(call.q_rows.begin + row)]);
  };
  const auto row_of = [&](int64_t position) {
    const int64_t distance = std::max<int64_t>(0, position - call.key_positions.offset);
    return std::min((distance + stride_ - 1) / stride_, call.keys.size());
  };
  const KeyRange first = keys_of(queries.begin), last = keys_of(queries.end - 1);
  return {row_of(first.lo), row_of(std::max(first.hi, last.hi))};
}

const std::vector<int64_t>& KeysSeen::PositionsOf(const SlotBlock& block) {
  const auto [known, added] = positions_.try_emplace(block);
  std::vector<int64_t>& positions = known->second;
  if (!added) return positions;
  if (block.span == Span::kBlock) return positions = layer_.layout.LocalPositions(block.index);
  positions.resize(static_cast<size_t>(plan_.super_size));
  for (size_t k = 0; k < plan_.problem.chunks.size(); ++k) {
    const Chunk& chunk = plan_.problem.chunks[k];
    if (SlotBlockOf(plan_, block.span, chunk.owner) != block) continue;
    for (int64_t i = 0; i < chunk.rows.size(); ++i) {
      positions[static_cast<size_t>(plan_.super_rows[k] + i)] = chunk.position + stride_ * i;
    }
  }
  return positions;
}

}  // namespace annulus
