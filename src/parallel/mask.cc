#include "annulus/parallel/mask.h"

#include <algorithm>

#include "annulus/base/check.h"

namespace annulus {
namespace {

// Rows i of an affine chunk with lo <= position + stride i < hi, as local rows of the owner.
RowRange RowsIn(const LayoutChunk& chunk, const KeyRange& keys) {
  const auto first_at_or_after = [&](int64_t position) {
    const int64_t distance = position - chunk.position;
    if (distance <= 0) return int64_t{0};
    if (distance > (chunk.rows - 1) * chunk.stride) return chunk.rows;  // most chunks: spares a division
    return (distance + chunk.stride - 1) / chunk.stride;
  };
  return {chunk.row + first_at_or_after(keys.lo), chunk.row + first_at_or_after(keys.hi)};
}

// What a chunk of queries sees of a chunk of keys.
struct Seen {
  RowRange hull;  // of the key rows
  int64_t pairs = 0;
};

int64_t CeilDiv(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// Sum over i in [0, n) of i + k, clamped to [0, most].
int64_t SumClamped(int64_t k, int64_t n, int64_t most) {
  const int64_t rise = std::clamp<int64_t>(-k, 0, n), full = std::clamp(most - k, rise, n);
  return (full - rise) * (rise + full - 1 + 2 * k) / 2 + (n - full) * most;
}

// The same as AddVisible for one sequence without documents, in time independent of its length: query i sees
// the key rows [i + lo, i + hi), as far as there are such.
void AddBand(const LayoutChunk& q, const std::vector<LayoutChunk>& chunks, const SequenceBatch& sequences,
             int64_t window, int64_t item, std::vector<Seen>* seen) {
  const int64_t length = sequences.lengths[static_cast<size_t>(item)], stride = q.stride;
  const int64_t queries = std::clamp<int64_t>(CeilDiv(length - q.position, stride), 0, q.rows);
  for (size_t j = 0; j < chunks.size(); ++j) {
    const LayoutChunk& of = chunks[j];
    ANNULUS_CHECK(of.stride == stride) << of.stride << " and " << stride;
    const int64_t rows = std::clamp<int64_t>(CeilDiv(length - of.position, stride), 0, of.rows);
    const int64_t ahead = q.position - of.position;
    const int64_t lo = window > 0 ? CeilDiv(ahead - window + 1, stride) : -queries;
    const int64_t hi = sequences.visibility == Visibility::kCausal ? CeilDiv(ahead + 1, stride)
                       : window > 0                                ? CeilDiv(ahead + window, stride)
                                                                   : rows;
    const int64_t pairs = SumClamped(hi, queries, rows) - SumClamped(lo, queries, rows);
    if (pairs == 0) continue;
    const int64_t first = std::max<int64_t>(0, 1 - hi), last = std::min(queries - 1, rows - 1 - lo);
    const RowRange band{of.row + std::max<int64_t>(0, first + lo), of.row + std::min(rows, last + hi)};
    RowRange& hull = (*seen)[j].hull;
    hull = hull.empty() ? band : RowRange{std::min(hull.begin, band.begin), std::max(hull.end, band.end)};
    (*seen)[j].pairs += pairs;
  }
}

// Adds what the queries of `q` see, by chunk of keys: once for those next to each other that see the same.
void AddVisible(const LayoutChunk& q, const std::vector<LayoutChunk>& chunks, const SequenceBatch& sequences,
                int64_t window, std::vector<Seen>* seen) {
  const auto add = [&](const KeyRange& keys, int64_t queries) {
    if (keys.lo >= keys.hi) return;
    for (size_t j = 0; j < chunks.size(); ++j) {
      const RowRange rows = RowsIn(chunks[j], keys);
      if (rows.empty()) continue;
      RowRange& hull = (*seen)[j].hull;
      hull = hull.empty() ? rows : RowRange{std::min(hull.begin, rows.begin), std::max(hull.end, rows.end)};
      (*seen)[j].pairs += queries * rows.size();
    }
  };
  for (int64_t item = 0; item < sequences.batch; ++item) {
    if (sequences.document_starts.empty()) {
      AddBand(q, chunks, sequences, window, item, seen);
      continue;
    }
    KeyRange same;
    int64_t queries = 0;
    for (int64_t i = 0; i < q.rows; ++i) {
      const KeyRange keys = VisibleKeys(sequences, window, item, q.position + q.stride * i);
      if (keys.lo != same.lo || keys.hi != same.hi) {
        add(same, queries);
        same = keys, queries = 0;
      }
      ++queries;
    }
    add(same, queries);
  }
}

// Piece `part` of `parts` of a chunk.
LayoutChunk PieceOf(const LayoutChunk& chunk, int part, int parts) {
  const int64_t begin = chunk.rows * part / parts, end = chunk.rows * (part + 1) / parts;
  return {chunk.row + begin, end - begin, chunk.position + chunk.stride * begin, chunk.stride};
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

int64_t DocumentStart(const SequenceBatch& sequences, int64_t item, int64_t position) {
  const size_t i = static_cast<size_t>(item);
  if (position >= sequences.lengths[i]) return position;
  return sequences.document_starts.empty() ? 0 : sequences.document_starts[i][static_cast<size_t>(position)];
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
                                    int64_t window, int64_t heads, int64_t kv_heads, int parts) {
  ANNULUS_CHECK(parts >= 1) << parts << " parts of a chunk";
  ExchangeProblem problem{.ranks = layout.ranks(),
                          .block_rows = layout.local_rows(),
                          .heads = heads,
                          .kv_heads = kv_heads,
                          .chunks = {},
                          .keys = {},
                          .pairs = {}};
  std::vector<LayoutChunk> chunks;
  for (int cp_rank = 0; cp_rank < layout.ranks(); ++cp_rank) {
    for (const LayoutChunk& chunk : layout.chunks(cp_rank)) {
      for (int part = 0; part < parts; ++part) {
        const LayoutChunk& piece = chunks.emplace_back(PieceOf(chunk, part, parts));
        problem.chunks.push_back({.owner = cp_rank,
                                  .rows = {piece.row, piece.row + piece.rows},
                                  .position = piece.position,
                                  .part = part});
      }
    }
  }
  for (const LayoutChunk& q : chunks) {
    std::vector<Seen> seen(chunks.size());
    AddVisible(q, chunks, sequences, window, &seen);
    for (const Seen& of_chunk : seen) {
      problem.keys.push_back(of_chunk.hull);
      problem.pairs.push_back(of_chunk.pairs);
    }
  }
  return problem;
}

}  // namespace annulus
