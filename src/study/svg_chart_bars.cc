// Stacked bars that lie, so that their labels have room on a phone too.

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "html_page.h"
#include "svg_chart.h"
#include "svg_chart_axis.h"
#include "svg_chart_parts.h"

namespace annulus {
namespace {

constexpr double kTop = 8, kLimitRow = 16;
constexpr double kLabelRow = 17, kBarHeight = 12, kBarGap = 3, kGroupGap = 8;
constexpr double kBottom = 44;

double SumOf(const std::vector<double>& parts) {
  double sum = 0;
  for (const double part : parts) sum += std::isfinite(part) ? std::max(0.0, part) : 0;
  return sum;
}

double HeightOf(const BarGroup& group) {
  return kLabelRow + (kBarHeight + kBarGap) * static_cast<double>(group.bars.size()) + kGroupGap;
}

std::string BarSvg(const BarChart& chart, const StackedBar& bar, const AxisMap& x, double y) {
  const char* look = bar.look == Look::kSimulated ? "simulated" : "measured";
  std::string svg;
  double sum = 0;
  for (size_t i = 0; i < bar.parts.size(); ++i) {
    const double part = bar.parts[i];
    if (!std::isfinite(part) || part <= 0) continue;
    const double from = x.At(sum), to = x.At(sum + part);
    sum += part;
    absl::StrAppend(&svg, "<rect class=\"bar ", look, " c", i % kChartColors, "\" x=\"", Px(from), "\" y=\"",
                    Px(y), "\" width=\"", Px(std::max(0.1, to - from)), "\" height=\"", Px(kBarHeight),
                    "\"><title>", Escaped(chart.parts[i]), ": ", Escaped(x.Text(part)), ", ", look,
                    "</title></rect>");
  }
  return svg;
}

// Above what they may cross.
std::string Texts(const BarGroup& group, const AxisMap& x, double left, double y) {
  std::string svg = TextAt(left, y + 13, "bar-label", group.label);
  double at = y + kLabelRow;
  for (const StackedBar& bar : group.bars) {
    absl::StrAppend(&svg, TextAt(x.At(SumOf(bar.parts)) + 6, at + kBarHeight - 1.5, "tick", bar.note));
    at += kBarHeight + kBarGap;
  }
  return svg;
}

std::string LimitSvg(const std::pair<double, std::string>& limit, const AxisMap& x, double bottom) {
  const double at = x.At(limit.first), half = TextWidth(limit.second) / 2;
  const double middle = std::clamp(at, half, std::max(half, kChartWidth - half));
  return absl::StrCat("<line class=\"limit\" x1=\"", Px(at), "\" x2=\"", Px(at), "\" y1=\"", Px(kLimitRow),
                      "\" y2=\"", Px(bottom), "\"/>",
                      TextAt(middle, kLimitRow - 4, "tick mid", limit.second));
}

}  // namespace

std::string Svg(const BarChart& chart) {
  std::vector<double> sums = {0};
  double notes = 0, height = 0;
  for (const BarGroup& group : chart.groups) {
    height += HeightOf(group);
    for (const StackedBar& bar : group.bars) {
      sums.push_back(SumOf(bar.parts));
      notes = std::max(notes, TextWidth(bar.note));
    }
  }
  if (chart.limit.has_value()) sums.push_back(chart.limit->first);
  AxisMap x(chart.x, sums, AxisEnds::kValues, 6);
  const double left = 6, right = kChartWidth - notes - 12;
  x.SetPixels(left, right);
  const double top = kTop + (chart.limit.has_value() ? kLimitRow : 0), bottom = top + height;

  std::string svg = OpenSvg(bottom + kBottom, chart.title, chart.description);
  for (const double tick : x.ticks()) {
    const std::string at = Px(x.At(tick));
    const std::string text = x.Text(tick);
    const double middle = std::max(x.At(tick), TextWidth(text) / 2 + 4);
    absl::StrAppend(&svg, "<line class=\"grid\" x1=\"", at, "\" x2=\"", at, "\" y1=\"", Px(top), "\" y2=\"",
                    Px(bottom + 4), "\"/>", TextAt(middle, bottom + 18, "tick mid", text));
  }
  absl::StrAppend(&svg, TextAt((left + right) / 2, bottom + 37, "name mid", chart.x.title));
  std::string texts;
  double y = top;
  for (const BarGroup& group : chart.groups) {
    absl::StrAppend(&texts, Texts(group, x, left, y));
    double at = y + kLabelRow;
    for (const StackedBar& bar : group.bars) {
      absl::StrAppend(&svg, BarSvg(chart, bar, x, at));
      at += kBarHeight + kBarGap;
    }
    y += HeightOf(group);
  }
  if (chart.limit.has_value()) absl::StrAppend(&svg, LimitSvg(*chart.limit, x, bottom));
  return absl::StrCat(svg, texts, "</svg>\n");
}

}  // namespace annulus
