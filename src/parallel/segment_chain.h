#pragma once

// The segments of all ranks in the order of their positions.

#include "annulus/parallel/sequence_layout.h"

namespace annulus {

class SegmentChain {
 public:
  explicit SegmentChain(const SequenceLayout& layout)
      : ranks_(layout.ranks()), per_rank_(static_cast<int>(layout.chunks(0).size())) {}

  int size() const { return ranks_ * per_rank_; }
  int per_rank() const { return per_rank_; }

  // cp rank and local index of the segment at a place of the chain, and back. Of two, the second ones come in
  // the opposite order of the first ones (zigzag).
  struct Segment {
    int cp_rank = 0, index = 0;
  };
  Segment At(int place) const {
    if (place < ranks_) return {place, 0};
    return {size() - 1 - place, 1};
  }
  int PlaceOf(const Segment& segment) const {
    return segment.index == 0 ? segment.cp_rank : size() - 1 - segment.cp_rank;
  }

 private:
  int ranks_, per_rank_;
};

}  // namespace annulus
