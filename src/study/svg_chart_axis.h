#pragma once

// From values to pixels, and round ticks.

#include <string>
#include <vector>

#include "svg_chart.h"

namespace annulus {

struct Range {
  double low = 0, high = 0;
};

// Where the axis ends: at the values themselves, or at the next tick.
enum class AxisEnds { kValues, kTicks };

class AxisMap {
 public:
  // `values`: all that is to be shown; what cannot be is left out.
  AxisMap(const Axis& axis, const std::vector<double>& values, AxisEnds ends, int most_ticks);

  void SetPixels(double low, double high) { pixels_ = {low, high}; }
  bool Shows(double value) const;
  double At(double value) const;  // pixels
  const std::vector<double>& ticks() const { return ticks_; }
  std::string Text(double tick) const;

 private:
  double Position(double value) const;  // linear in pixels
  void TickLinear(AxisEnds ends, int most_ticks);
  void TickLog(AxisEnds ends, int most_ticks);

  Axis axis_;
  Range range_;
  Range pixels_ = {0, 1};
  std::vector<double> ticks_;
};

// Ascending multiples of 1, 2 or 5 times a power of ten within [low, high], at most `most`.
std::vector<double> RoundTicks(double low, double high, int most);

// Of text of this many letters in the charts' font; letters of several bytes count once.
double TextWidth(const std::string& text);

// Coordinates to a tenth of a pixel, without a point where they are whole.
std::string Px(double pixels);

}  // namespace annulus
