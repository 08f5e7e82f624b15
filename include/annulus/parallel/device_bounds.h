#pragma once

// Mask bounds that the kernel calls of one rank's part of a plan read, on its device. Queries of a block or
// super-block have bounds there only if some call reads them.

#include <functional>
#include <map>
#include <vector>

#include "annulus/parallel/attend_calls.h"

namespace annulus {

class DeviceBounds {
 public:
  // Makes the bounds of `calls` (by step), in memory of an earlier Fill where that is large enough.
  // `bounds_of` gives those of the rows that calls of BoundsSource::kMask name.
  void Fill(Context& ctx, int64_t batch, const std::vector<std::vector<AttendCall>>& calls,
            const std::function<BoundsTable(const SlotBlock&)>& bounds_of);

  MaskBounds Of(const AttendCall& call) const;  // of a call that Fill was given

 private:
  MaskBounds Rows(int64_t lo, int64_t hi, const RowRange& rows) const;

  int64_t batch_ = 1;
  int64_t everything_ = 0, index_ = 0;  // where the upper bounds of a source begin; the lower ones are at 0
  struct Place {
    int64_t lo = 0, hi = 0;
  };
  std::map<SlotBlock, Place> masks_;
  Tensor table_;  // i64: nothing, everything, index + 1 of every row that calls have, then lo and hi of masks
};

}  // namespace annulus
