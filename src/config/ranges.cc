#include "annulus/train/ranges.h"

#include "absl/strings/str_cat.h"

namespace annulus {

bool RealRange::Contains(double value) const {
  const bool above = low_bound == Bound::kOpen ? value > low : value >= low;
  const bool below = high_bound == Bound::kOpen ? value < high : value <= high;
  return above && below;
}

std::string Describe(const IntRange& range) {
  if (range.high == std::numeric_limits<int64_t>::max())
    return absl::StrCat("an integer of at least ", range.low);
  return absl::StrCat("an integer from ", range.low, " to ", range.high);
}

std::string Describe(const RealRange& range) {
  const bool open_low = range.low_bound == RealRange::Bound::kOpen;
  const bool open_high = range.high_bound == RealRange::Bound::kOpen;
  return absl::StrCat("a number in ", open_low ? "(" : "[", range.low, ", ", range.high,
                      open_high ? ")" : "]");
}

}  // namespace annulus
