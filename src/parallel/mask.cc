#include "annulus/parallel/mask.h"

#include <algorithm>

namespace annulus {
namespace {

// Rows i of an affine chunk with lo <= position + stride i < hi, as local rows of the owner.
RowRange RowsIn(const LayoutChunk& chunk, const KeyRange& keys) {
  const auto first_at_or_after = [&](int64_t position) {
    const int64_t distance = position - chunk.position;
    if (distance <= 0) return int64_t{0};
    return std::min(chunk.rows, (distance + chunk.stride - 1) / chunk.stride);
  };
  return {chunk.row + first_at_or_after(keys.lo), chunk.row + first_at_or_after(keys.hi)};
}

struct PlacedChunk {
  int owner;
  LayoutChunk chunk;
};

// Adds what the queries of `q` see of `kv` to the hull and the pair count.
void AddVisible(const LayoutChunk& q, const LayoutChunk& kv, const SequenceBatch& sequences, int64_t window,
                RowRange* hull, int64_t* pairs) {
  for (int64_t i = 0; i < q.rows; ++i) {
    for (int64_t item = 0; item < sequences.batch; ++item) {
      const KeyRange keys = VisibleKeys(sequences, window, item, q.position + q.stride * i);
      if (keys.lo >= keys.hi) continue;
      const RowRange rows = RowsIn(kv, keys);
      if (rows.empty()) continue;
      *hull =
          hull->empty() ? rows : RowRange{std::min(hull->begin, rows.begin), std::max(hull->end, rows.end)};
      *pairs += rows.size();
    }
  }
}

}  // namespace

KeyRange VisibleKeys(const SequenceBatch& sequences, int64_t window, int64_t item, int64_t position) {
  const int64_t length = sequences.lengths[static_cast<size_t>(item)];
  if (position >= length) return {};
  const bool causal = sequences.visibility == Visibility::kCausal;
  KeyRange keys{0, causal ? position + 1 : length};
  if (window > 0) {
    keys.lo = std::max(keys.lo, position - window + 1);
    if (keys.hi - position > window) keys.hi = position + window;
  }
  if (!sequences.document_starts.empty()) {
    const std::vector<int64_t>& starts = sequences.document_starts[static_cast<size_t>(item)];
    const auto here = starts.begin() + position;
    keys.lo = std::max(keys.lo, *here);
    // Starts ascend: the document goes on as long as they do not change.
    const auto end = causal ? here + 1 : std::upper_bound(here, starts.begin() + keys.hi, *here);
    keys.hi = end - starts.begin();
  }
  return keys;
}

int64_t VisiblePairs(const SequenceBatch& sequences, int64_t window) {
  int64_t pairs = 0;
  for (int64_t item = 0; item < sequences.batch; ++item) {
    for (int64_t position = 0; position < sequences.lengths[static_cast<size_t>(item)]; ++position) {
      const KeyRange keys = VisibleKeys(sequences, window, item, position);
      pairs += keys.hi - keys.lo;
    }
  }
  return pairs;
}

BoundsTable LocalBounds(const SequenceLayout& layout, const SequenceBatch& sequences, int64_t window,
                        int cp_rank) {
  BoundsTable table;
  table.lo.reserve(static_cast<size_t>(layout.local_rows() * sequences.batch));
  table.hi.reserve(static_cast<size_t>(layout.local_rows() * sequences.batch));
  for (int64_t position : layout.LocalPositions(cp_rank)) {
    for (int64_t item = 0; item < sequences.batch; ++item) {
      const KeyRange keys = VisibleKeys(sequences, window, item, position);
      table.lo.push_back(keys.lo);
      table.hi.push_back(keys.hi);
    }
  }
  return table;
}

ExchangeProblem MakeExchangeProblem(const SequenceLayout& layout, const SequenceBatch& sequences,
                                    int64_t window) {
  ExchangeProblem problem;
  problem.ranks = layout.ranks();
  problem.block_rows = layout.local_rows();
  std::vector<PlacedChunk> placed;
  for (int cp_rank = 0; cp_rank < layout.ranks(); ++cp_rank) {
    for (const LayoutChunk& chunk : layout.chunks(cp_rank)) {
      placed.push_back({cp_rank, chunk});
      problem.chunks.push_back({cp_rank, {chunk.row, chunk.row + chunk.rows}});
    }
  }
  problem.keys.resize(placed.size() * placed.size());
  problem.pairs.resize(problem.keys.size());
  for (size_t i = 0; i < placed.size(); ++i) {
    for (size_t j = 0; j < placed.size(); ++j) {
      const size_t cell = i * placed.size() + j;
      AddVisible(placed[i].chunk, placed[j].chunk, sequences, window, &problem.keys[cell],
                 &problem.pairs[cell]);
    }
  }
  return problem;
}

}  // namespace annulus
