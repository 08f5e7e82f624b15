#pragma once

// Kernel calls of one computing step of an exchange plan. The plan speaks of pairs of chunks; where their
// union is a rectangle of which every query sees every key (or a causal square), one call does it, and
// kernels that know no bounds can serve it. Zigzag, P = 4, rank 1 (chunks 1 and 6), in order of local rows:
//
//     own block      block of rank 0 (0, 7)    block of rank 2 (2, 5)
//       1 6                0 7                       2 5
//     1 \ .              1 x .                     1 . .           \ causal   x full   . masked
//     6 x \              6 x .                     6 x x
//     one causal call    one full call             one full call

#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "annulus/ops/attention.h"
#include "annulus/parallel/mask.h"

namespace annulus {

// Bounds that a call's kernel reads.
enum class BoundsSource {
  kMask,        // the mask's own, with the keys' global positions
  kEverything,  // key rows 0 .. of the call, all visible
  kIndex,       // query row i of the call sees key rows 0 .. i
};

struct AttendCall {
  RowRange q_rows;  // of this rank
  RowRange keys;    // rows of the block
  MaskShape shape = MaskShape::kGeneral;
  BoundsSource bounds = BoundsSource::kMask;
  KeyPositions key_positions;
};

// Calls that together compute the step's pairs, each (query, key) pair once.
std::vector<AttendCall> CallsOf(const SequenceLayout& layout, const ExchangeProblem& problem,
                                const Step& step, const BoundsTable& bounds, int64_t batch);

// The bounds of all sources on a device: i64 [5, rows * batch].
class DeviceBounds {
 public:
  DeviceBounds() = default;
  DeviceBounds(Device device, int64_t rows, int64_t batch);
  void Fill(Context& ctx, const BoundsTable& bounds);

  MaskBounds Of(const AttendCall& call) const;
  int64_t rows() const { return rows_; }
  int64_t batch() const { return batch_; }

 private:
  int64_t rows_ = 0, batch_ = 0;
  Tensor table_;  // lo, hi, nothing, everything, index + 1
};

}  // namespace annulus
