#pragma once

// Random batches of sequences, and their mask said pair by pair: what bounds, plans and attention are judged
// by.

#include <algorithm>
#include <string>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/parallel/mask.h"

namespace annulus::testing {

inline constexpr LayoutKind kLayouts[] = {LayoutKind::kContiguous, LayoutKind::kZigzag, LayoutKind::kStriped};

inline std::string NameOf(LayoutKind kind) {
  return kind == LayoutKind::kContiguous ? "contiguous" : kind == LayoutKind::kZigzag ? "zigzag" : "striped";
}

enum class Documents { kNone, kRandom };
enum class Lengths { kFull, kRandom };

// A batch under a layout of `length` positions. Random lengths leave the first sequence whole.
inline SequenceBatch RandomSequences(uint64_t seed, int64_t length, int64_t batch, Lengths lengths,
                                     Documents documents) {
  const RandomStream random(seed, "sequences");
  uint64_t draws = 0;
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random.Below(draws++, static_cast<uint64_t>(n)));
  };
  SequenceBatch sequences{.batch = batch, .lengths = {}, .document_starts = {}};
  for (int64_t item = 0; item < batch; ++item) {
    sequences.lengths.push_back(lengths == Lengths::kFull || item == 0 ? length : 1 + below(length));
    if (documents == Documents::kNone) continue;
    const int64_t mean_document = 1 + below(length);
    std::vector<int64_t> starts;
    for (int64_t position = 0, start = 0; position < length; ++position) {
      if (below(mean_document) == 0) start = position;
      starts.push_back(start);
    }
    sequences.document_starts.push_back(std::move(starts));
  }
  return sequences;
}

// Whether the query at position q of sequence `item` sees the key at position k.
inline bool Sees(const SequenceBatch& sequences, int64_t window, int64_t item, int64_t q, int64_t k) {
  const int64_t length = sequences.lengths[static_cast<size_t>(item)];
  if (q >= length || k >= length) return false;
  if (sequences.visibility == Visibility::kCausal && k > q) return false;
  if (window > 0 && (q - k >= window || k - q >= window)) return false;
  if (sequences.document_starts.empty()) return true;
  const std::vector<int64_t>& starts = sequences.document_starts[static_cast<size_t>(item)];
  return starts[static_cast<size_t>(q)] == starts[static_cast<size_t>(k)];
}

}  // namespace annulus::testing
