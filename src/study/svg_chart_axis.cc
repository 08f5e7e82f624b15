#include "svg_chart_axis.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "annulus/base/check.h"

namespace annulus {
namespace {

constexpr double kLetter = 7.8;  // mean width of a letter of 13 pixels
constexpr double kMostTicks = 1000;

double RoundStep(double range, int most) {
  const double least = range / std::max(1, most - 1);
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  }
  return 10 * power;
}

// Every value of `all` within the range; every n-th of them if they are too many.
std::vector<double> Thinned(const std::vector<double>& all, size_t most) {
  const size_t stride = (all.size() + most - 1) / std::max<size_t>(1, most);
  std::vector<double> kept;
  for (size_t i = 0; i < all.size(); i += std::max<size_t>(1, stride)) kept.push_back(all[i]);
  return kept;
}

// factor * base^k for each factor.
std::vector<double> PowerTicks(Range range, double base, const std::vector<double>& factors) {
  std::vector<double> ticks;
  const int first = static_cast<int>(std::floor(std::log(range.low) / std::log(base) + 1e-9));
  for (int k = first; std::pow(base, k) <= range.high * (1 + 1e-9); ++k) {
    for (const double factor : factors) {
      const double tick = factor * std::pow(base, k);
      if (tick >= range.low * (1 - 1e-9) && tick <= range.high * (1 + 1e-9)) ticks.push_back(tick);
    }
  }
  return ticks;
}

}  // namespace

std::vector<double> RoundTicks(double low, double high, int most) {
  std::vector<double> ticks;
  if (!(high > low) || !std::isfinite(high - low)) return {low};
  const double step = RoundStep(high - low, most);
  const double first = std::ceil(low / step - 1e-9);
  for (double i = 0; i < kMostTicks && (first + i) * step <= high + step * 1e-9; ++i) {
    ticks.push_back((first + i) * step);
  }
  return ticks;
}

AxisMap::AxisMap(const Axis& axis, const std::vector<double>& values, AxisEnds ends, int most_ticks)
    : axis_(axis) {
  std::vector<double> shown;
  for (const double value : values) {
    if (Shows(value)) shown.push_back(value);
  }
  if (axis.from.has_value()) shown.push_back(*axis.from);
  if (axis.to.has_value()) shown.push_back(*axis.to);
  const bool log = axis.scale != Scale::kLinear;
  if (shown.empty()) shown = {log ? 1.0 : 0.0, 2.0};
  const auto [low, high] = std::minmax_element(shown.begin(), shown.end());
  range_ = {*low, *high};
  if (log) {
    TickLog(ends, most_ticks);
  } else {
    TickLinear(ends, most_ticks);
  }
}

void AxisMap::TickLinear(AxisEnds ends, int most_ticks) {
  // One value alone is shown with room around it.
  if (range_.high - range_.low <= 1e-12 * std::abs(range_.high)) {
    const double room = range_.low == 0 ? 1 : std::abs(range_.low) / 10;
    range_ = {range_.low - (range_.low == 0 ? 0 : room), range_.high + room};
  }
  if (ends == AxisEnds::kTicks) {
    const double step = RoundStep(range_.high - range_.low, most_ticks);
    range_ = {std::floor(range_.low / step + 1e-9) * step, std::ceil(range_.high / step - 1e-9) * step};
  }
  ticks_ = RoundTicks(range_.low, range_.high, most_ticks);
}

void AxisMap::TickLog(AxisEnds ends, int most_ticks) {
  if (ends == AxisEnds::kTicks || range_.high / range_.low < 1.01) {
    // To a round number beside the ends, so that no point lies on the frame.
    const double power = std::pow(10, std::floor(std::log10(range_.low)));
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor * power <= range_.low) ticks_ = {factor * power};
    }
    const double upper = std::pow(10, std::floor(std::log10(range_.high)));
    double high = 10 * upper;
    for (const double factor : {5.0, 2.0, 1.0}) {
      if (factor * upper >= range_.high) high = factor * upper;
    }
    range_ = {ticks_.front(), high};
    if (range_.high <= range_.low) range_.high = 2 * range_.low;
  }
  const size_t most = static_cast<size_t>(most_ticks);
  if (axis_.scale == Scale::kLog2) {
    ticks_ = Thinned(PowerTicks(range_, 2, {1}), most);
  } else {
    ticks_ = PowerTicks(range_, 10, {1, 2, 5});
    if (ticks_.size() > most) ticks_ = PowerTicks(range_, 10, {1, 3});
    if (ticks_.size() > most) ticks_ = Thinned(PowerTicks(range_, 10, {1}), most);
  }
  if (ticks_.size() < 2) ticks_ = RoundTicks(range_.low, range_.high, most_ticks);
}

bool AxisMap::Shows(double value) const {
  return std::isfinite(value) && (axis_.scale == Scale::kLinear || value > 0);
}

double AxisMap::Position(double value) const {
  return axis_.scale == Scale::kLinear ? value : std::log2(value);
}

double AxisMap::At(double value) const {
  const double low = Position(range_.low), high = Position(range_.high);
  const double share = high > low ? (Position(value) - low) / (high - low) : 0.5;
  return pixels_.low + share * (pixels_.high - pixels_.low);
}

std::string AxisMap::Text(double tick) const {
  const double clean = std::abs(tick) < 1e-12 * (range_.high - range_.low) ? 0 : tick;
  return axis_.text ? axis_.text(clean) : absl::StrFormat("%.6g", clean);
}

double TextWidth(const std::string& text) {
  const auto letters = std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
  return kLetter * static_cast<double>(letters);
}

std::string Px(double pixels) {
  const double tenths = std::round(pixels * 10);
  if (tenths == 10 * std::round(pixels)) return absl::StrFormat("%.0f", std::round(pixels) + 0.0);
  return absl::StrFormat("%.1f", tenths / 10);
}

}  // namespace annulus
