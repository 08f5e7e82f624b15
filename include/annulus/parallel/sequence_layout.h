#pragma once

// Global token <-> (cp rank, local row) of a sequence split over a context-parallel group. Positions are
// always global. The sequence is padded so that every rank holds the same number of rows; padding rows are
// positions [length, padded_length): never attended, never counted.
//
//   contiguous, P = 2:  | 0 0 0 0 1 1 1 1 |        one chunk a rank
//   zigzag,     P = 2:  | 0 0 1 1 1 1 0 0 |        chunks r and 2P-1-r: equal causal work
//   striped,    P = 2:  | 0 1 0 1 0 1 0 1 |        token t on rank t mod P: equal causal work

#include <cstdint>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

enum class LayoutKind { kContiguous, kZigzag, kStriped };

// A run of local rows whose global positions are affine: row `row + i` is at position + stride * i.
struct LayoutChunk {
  int64_t row = 0, rows = 0;
  int64_t position = 0, stride = 1;
};

class SequenceLayout {
 public:
  // Any length >= 1 and ranks >= 1. Local rows are padded to a multiple of `row_multiple`, so that a
  // tensor-parallel group can split them.
  SequenceLayout(LayoutKind kind, int64_t length, int ranks, int row_multiple = 1);

  LayoutKind kind() const { return kind_; }
  int ranks() const { return ranks_; }
  int64_t length() const { return length_; }
  int64_t local_rows() const { return local_rows_; }  // the same on every rank
  int64_t padded_length() const { return local_rows_ * ranks_; }
  // The rank's chunks in order of local row; one, or two for zigzag. Equal sizes on every rank.
  std::vector<LayoutChunk> chunks(int cp_rank) const;

  struct Place {
    int cp_rank;
    int64_t row;
    friend bool operator==(const Place&, const Place&) = default;
  };
  Place PlaceOf(int64_t position) const;  // position < padded_length()
  int64_t PositionOf(int cp_rank, int64_t row) const;
  std::vector<int64_t> LocalPositions(int cp_rank) const;  // local_rows() entries

 private:
  LayoutKind kind_;
  int64_t length_;
  int ranks_;
  int64_t local_rows_;
};

}  // namespace annulus
