#include "report_text.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "annulus/base/median.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

std::string NotFinite(double value) { return std::isnan(value) ? "NaN" : value > 0 ? "inf" : "-inf"; }

}  // namespace

std::string StepText(double seconds) {
  if (!std::isfinite(seconds)) return NotFinite(seconds);
  if (seconds >= 100) return absl::StrFormat("%.1f s", seconds);
  if (seconds >= 1) return absl::StrFormat("%.2f s", seconds);
  const double ms = seconds * 1e3;
  return absl::StrFormat(ms >= 99.95   ? "%.0f ms"
                         : ms >= 9.995 ? "%.1f ms"
                         : ms == 0     ? "%.0f ms"
                                       : "%.2f ms",
                         ms);
}

std::string RateText(double per_second) {
  if (!std::isfinite(per_second)) return NotFinite(per_second);
  return per_second < 100 ? absl::StrFormat("%.4g", per_second) : FormatCount(per_second);
}

std::string PercentText(double share) {
  return std::isfinite(share) ? absl::StrFormat("%.1f%%", 100 * share) : NotFinite(share);
}

std::string ErrorText(double share) {
  return std::isfinite(share) ? absl::StrFormat("%+.1f%%", 100 * share) : NotFinite(share);
}

std::string ErrorsText(const std::vector<double>& sizes, const std::string& worst) {
  return absl::StrCat("off by ", PercentText(Median(sizes)), " in the median and ",
                      PercentText(*std::max_element(sizes.begin(), sizes.end())), " at worst (", worst,
                      "), of ", CountText(static_cast<int64_t>(sizes.size()), "point"));
}

std::string SizeText(double bytes) { return std::isfinite(bytes) ? FormatBytes(bytes) : NotFinite(bytes); }

std::string TickText(double value) {
  for (const auto& [unit, name] : {std::pair{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}}) {
    if (std::abs(value) >= unit) return absl::StrFormat("%.4g%s", value / unit, name);
  }
  return absl::StrFormat("%.4g", value);
}

std::string PercentTick(double share) { return absl::StrFormat("%.4g%%", 100 * share); }

std::string NumberText(double value) {
  return std::isfinite(value) ? absl::StrFormat("%.4g", value) : NotFinite(value);
}

ByteUnit ByteUnitFor(double most) {
  ByteUnit unit{"B", 1};
  for (const char* name : {"KiB", "MiB", "GiB", "TiB"}) {
    if (!(most >= 1024 * unit.bytes)) break;
    unit = {name, 1024 * unit.bytes};
  }
  return unit;
}

}  // namespace annulus
