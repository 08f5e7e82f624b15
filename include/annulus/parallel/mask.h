#pragma once

// Attention masks as bounds: the query at global position p sees keys in [lo(p), hi(p)). Full, causal, window
// and document masks are all of this form, and so are their intersections.

#include <cstdint>
#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "annulus/parallel/sequence_layout.h"

namespace annulus {

// Whether a query sees keys behind it only, as in training on the next token, or on both sides.
enum class Visibility { kCausal, kFull };

// Which positions of each sequence of a batch exist, where documents start, and what a query may see of them.
struct SequenceBatch {
  int64_t batch = 1;
  std::vector<int64_t> lengths;  // [batch]; keys at or after a length are padding
  // [batch][position], the position at which the document of a position starts; empty = one document.
  std::vector<std::vector<int64_t>> document_starts;
  Visibility visibility = Visibility::kCausal;
};

struct KeyRange {
  int64_t lo = 0, hi = 0;  // empty when hi <= lo
};

// Keys that the query at `position` of sequence `item` sees: those less than `window` away (0 = all), of its
// own document, and with Visibility::kCausal none after it. Empty for padding.
KeyRange VisibleKeys(const SequenceBatch& sequences, int64_t window, int64_t item, int64_t position);

// The position at which the document of a position starts; of padding, the position itself.
int64_t DocumentStart(const SequenceBatch& sequences, int64_t item, int64_t position);

// (query, key) pairs that are computed, of all sequences together.
int64_t VisiblePairs(const SequenceBatch& sequences, int64_t window);

// Bounds of one rank's rows, index row * batch + item.
struct BoundsTable {
  std::vector<int64_t> lo, hi;
};
BoundsTable LocalBounds(const SequenceLayout& layout, const SequenceBatch& sequences, int64_t window,
                        int cp_rank);

// What the group must compute, for the exchange builders: which key rows of each chunk the queries of each
// other chunk see, hulls over rows and over the batch. Chunks are those of the layout, each cut in `parts`
// of nearly equal size, which may be empty.
ExchangeProblem MakeExchangeProblem(const SequenceLayout& layout, const SequenceBatch& sequences,
                                    int64_t window, int64_t heads, int64_t kv_heads, int parts = 1);

}  // namespace annulus
