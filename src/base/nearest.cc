#include "annulus/base/nearest.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace annulus {

std::string NearestOf(int64_t below, int64_t above) {
  if (below == above || below < 1) return absl::StrCat(" (nearest valid value ", above, ")");
  return absl::StrCat(" (nearest valid value ", below, " or ", above, ")");
}

std::string NearestMultiple(int64_t value, int64_t unit) {
  const int64_t below = value / unit * unit;
  return NearestOf(below, below == value ? value : below + unit);
}

std::string NearestDivisor(int64_t value, int64_t total) {
  int64_t below = std::clamp<int64_t>(value, 1, total);
  int64_t above = below;
  while (total % below != 0) --below;
  while (total % above != 0) ++above;
  return NearestOf(below, above);
}

}  // namespace annulus
