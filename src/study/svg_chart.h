#pragma once

// Charts as inline SVG for a page of html_page.h, whose style sheet draws them: shapes carry classes, no
// colors. Measured and simulated differ in form (solid and filled, dashed and hollow), series in color and in
// the shape of their points, so that nothing rests on color alone.

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

inline constexpr int kChartColors = 8;  // what the style sheet tells apart
inline constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

enum class Scale { kLinear, kLog2, kLog10 };

struct Axis {
  std::string title;  // with the unit
  Scale scale = Scale::kLinear;
  std::function<std::string(double)> text = {};  // of a tick; empty: the shortest
  std::optional<double> from = {}, to = {};      // shown in any case
};

enum class Look {
  kMeasured,   // solid, points filled
  kSimulated,  // dashed, points hollow
  kGuide,      // thin and dotted, no points: to compare with
  kArea,       // what lies between low and high
};

enum class Draw { kLineAndPoints, kLine, kPoints };

// Values that are not finite leave a gap; on a logarithmic axis also those that are not above zero.
struct ChartPoint {
  double x = 0, y = 0;
  double low = kNotANumber, high = kNotANumber;  // a band, if both are finite
};

struct Curve {
  std::string label = {};      // in titles of its points
  std::string end_label = {};  // beside its last point; short
  int color = 0;               // of kChartColors
  Look look = Look::kMeasured;
  Draw draw = Draw::kLineAndPoints;
  std::vector<ChartPoint> data = {};  // ascending in x
};

// A vertical line with its label above the plot, where there is room; a mark without a label is short.
struct ChartMark {
  double x = 0;
  std::string label;
};

struct LineChart {
  std::string title, description;  // for those who do not see it
  Axis x, y;
  std::vector<Curve> curves = {};
  std::vector<ChartMark> marks = {};
};
std::string Svg(const LineChart& chart);

// Horizontal stacked bars, each group with its label above.
struct StackedBar {
  std::vector<double> parts;
  Look look = Look::kMeasured;
  std::string note;  // to the right
};
struct BarGroup {
  std::string label;
  std::vector<StackedBar> bars;
};
struct BarChart {
  std::string title, description;
  Axis x;
  std::vector<std::string> parts;  // color i for part i
  std::vector<BarGroup> groups = {};
  std::optional<std::pair<double, std::string>> limit = {};  // a vertical line with its label
};
std::string Svg(const BarChart& chart);

// The entries of a legend: a swatch and its text.
struct LegendEntry {
  enum class Swatch { kSeries, kMeasured, kSimulated, kGuide, kBar, kSimulatedBar };
  Swatch swatch = Swatch::kSeries;
  int color = 0;
  std::string text;
};
std::string LegendHtml(const std::vector<LegendEntry>& entries);

}  // namespace annulus
