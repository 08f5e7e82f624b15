#pragma once

// Attention layers of all masks, layouts and ways to share heads, small enough to run by every exchange plan,
// and the one rank that they must equal.

#include "annulus/comm/exchange_build.h"
#include "parallel/attention_layer.h"

namespace annulus::testing {

struct HeadCounts {
  int64_t heads, kv_heads;
};
// Every kind of sharing, and counts that hardly any number of ranks divides.
inline constexpr HeadCounts kHeadCounts[] = {{3, 3}, {6, 2}, {4, 1}, {5, 5}, {9, 3}, {5, 1}, {4, 2}, {8, 8}};

struct MaskCase {
  const char* name;
  int64_t batch, window;
  Documents documents;
  Lengths lengths;
  Visibility visibility;
};
inline constexpr MaskCase kMasks[] = {
    {"causal", 1, 0, Documents::kNone, Lengths::kFull, Visibility::kCausal},
    {"window", 2, 13, Documents::kNone, Lengths::kRandom, Visibility::kCausal},
    {"documents", 2, 0, Documents::kRandom, Lengths::kRandom, Visibility::kCausal},
    {"full", 2, 0, Documents::kNone, Lengths::kRandom, Visibility::kFull},
};

// Its length and heads are drawn.
inline LayerCase MakeCase(const MaskCase& mask, LayoutKind kind, int ranks, uint64_t draw) {
  const RandomStream random(draw, "exchange plans");
  // Mostly with padding; sometimes fewer tokens than all ranks could have a chunk of.
  const int64_t per_rank = 8 + static_cast<int64_t>(random.Below(0, 17));
  const int64_t length = draw % 13 == 0 ? 1 + static_cast<int64_t>(random.Below(1, 9))
                                        : per_rank * ranks - static_cast<int64_t>(random.Below(2, 3));
  const HeadCounts& heads = kHeadCounts[random.Below(3, std::size(kHeadCounts))];
  LayerCase c{SequenceLayout(kind, length, ranks),
              RandomSequences(draw, length, mask.batch, mask.lengths, mask.documents),
              {.heads = heads.heads,
               .kv_heads = heads.kv_heads,
               .head_dim = 4,
               .v_head_dim = 6,
               .window = mask.window,
               .scale = 0.4}};
  c.sequences.visibility = mask.visibility;
  if (mask.visibility == Visibility::kFull && draw % 2 == 0) c.shape.window = 11;
  return c;
}

// The same sequences on one rank.
inline WholeLayer<double> OneRank(LayerCase c) {
  c.layout = SequenceLayout(LayoutKind::kContiguous, c.layout.length(), 1);
  return RunLayer(c, MakeInputs<double>(c));
}

}  // namespace annulus::testing
