// Lines and points, and what all charts have in common.

#include "svg_chart.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "svg_chart_axis.h"
#include "svg_chart_parts.h"

namespace annulus {
namespace {

constexpr double kPlotHeight = 210;
constexpr double kTop = 26;      // the title of the y axis above the plot
constexpr double kMarkRow = 16;  // labels of marks, above the title
constexpr double kBottom = 44;   // ticks and the title of the x axis
constexpr double kLabelHeight = 14;
constexpr double kInset = 10;  // of points from the sides of the plot

struct Plot {
  double left = 0, right = 0, top = 0, bottom = 0;
};

std::vector<double> ValuesOf(const LineChart& chart, double ChartPoint::* member) {
  std::vector<double> values;
  for (const Curve& curve : chart.curves) {
    for (const ChartPoint& point : curve.data) {
      if (curve.look == Look::kArea && member == &ChartPoint::y) continue;
      values.push_back(point.*member);
    }
  }
  return values;
}

std::vector<double> HeightsOf(const LineChart& chart) {
  std::vector<double> values = ValuesOf(chart, &ChartPoint::y);
  for (const auto member : {&ChartPoint::low, &ChartPoint::high}) {
    const std::vector<double> band = ValuesOf(chart, member);
    values.insert(values.end(), band.begin(), band.end());
  }
  return values;
}

std::string Grid(const LineChart& chart, const AxisMap& x, const AxisMap& y, const Plot& plot) {
  std::string svg;
  for (const double tick : y.ticks()) {
    const std::string at = Px(y.At(tick));
    absl::StrAppend(&svg, "<line class=\"grid\" x1=\"", Px(plot.left), "\" x2=\"", Px(plot.right), "\" y1=\"",
                    at, "\" y2=\"", at, "\"/>",
                    TextAt(plot.left - 6, y.At(tick) + 4, "tick end", y.Text(tick)));
  }
  double free = -1e9;  // from here on no label has been set
  for (const double tick : x.ticks()) {
    const std::string at = Px(x.At(tick));
    absl::StrAppend(&svg, "<line class=\"axis\" x1=\"", at, "\" x2=\"", at, "\" y1=\"", Px(plot.bottom),
                    "\" y2=\"", Px(plot.bottom + 4), "\"/>");
    const double width = TextWidth(x.Text(tick));
    if (x.At(tick) - width / 2 < free) continue;
    free = x.At(tick) + width / 2 + 6;
    absl::StrAppend(&svg, TextAt(x.At(tick), plot.bottom + 18, "tick mid", x.Text(tick)));
  }
  absl::StrAppend(&svg, "<line class=\"axis\" x1=\"", Px(plot.left), "\" x2=\"", Px(plot.right), "\" y1=\"",
                  Px(plot.bottom), "\" y2=\"", Px(plot.bottom), "\"/>",
                  TextAt((plot.left + plot.right) / 2, plot.bottom + 37, "name mid", chart.x.title),
                  TextAt(4, plot.top - 11, "name", chart.y.title));
  return svg;
}

std::string MarksSvg(const LineChart& chart, const AxisMap& x, const Plot& plot) {
  std::string svg;
  double free = -1e9;
  for (const ChartMark& mark : chart.marks) {
    if (!x.Shows(mark.x)) continue;
    const double at = x.At(mark.x);
    absl::StrAppend(&svg, "<line class=\"mark\" x1=\"", Px(at), "\" x2=\"", Px(at), "\" y1=\"",
                    Px(plot.top - 4), "\" y2=\"", Px(mark.label.empty() ? plot.top + 6 : plot.bottom),
                    "\"/>");
    if (mark.label.empty()) continue;
    const double width = TextWidth(mark.label);
    const double middle = std::clamp(at, width / 2 + 2, std::max(width / 2 + 2, kChartWidth - width / 2 - 2));
    if (middle - width / 2 < free) continue;
    free = middle + width / 2 + 6;
    absl::StrAppend(&svg, TextAt(middle, kMarkRow - 4, "tick mid", mark.label));
  }
  return svg;
}

// Pieces of a curve without gaps.
std::vector<std::vector<ChartPoint>> Pieces(const Curve& curve, const AxisMap& x, const AxisMap& y) {
  std::vector<std::vector<ChartPoint>> pieces(1);
  for (const ChartPoint& point : curve.data) {
    if (x.Shows(point.x) && y.Shows(point.y)) {
      pieces.back().push_back(point);
    } else if (!pieces.back().empty()) {
      pieces.emplace_back();
    }
  }
  if (pieces.back().empty()) pieces.pop_back();
  return pieces;
}

std::string ClassOf(const Curve& curve) {
  const char* look = curve.look == Look::kMeasured    ? "measured"
                     : curve.look == Look::kSimulated ? "simulated"
                                                      : "guide";
  return absl::StrCat(look, " c", curve.color % kChartColors);
}

std::string BandSvg(const Curve& curve, const AxisMap& x, const AxisMap& y) {
  std::string there, back;
  for (const ChartPoint& point : curve.data) {
    if (!x.Shows(point.x) || !y.Shows(point.low) || !y.Shows(point.high)) continue;
    const std::string at = Px(x.At(point.x));
    absl::StrAppend(&there, there.empty() ? "" : " ", at, ",", Px(y.At(point.high)));
    back = absl::StrCat(" ", at, ",", Px(y.At(point.low)), back);
  }
  if (there.empty()) return "";
  const char* name = curve.look == Look::kArea ? "area" : "band";
  return absl::StrCat("<polygon class=\"", name, " c", curve.color % kChartColors, "\" points=\"", there,
                      back, "\"/>");
}

std::string LinesSvg(const Curve& curve, const AxisMap& x, const AxisMap& y) {
  std::string svg;
  if (curve.draw == Draw::kPoints) return svg;
  for (const std::vector<ChartPoint>& piece : Pieces(curve, x, y)) {
    if (piece.size() < 2) continue;
    absl::StrAppend(&svg, "<polyline class=\"line ", ClassOf(curve), "\" points=\"");
    for (size_t i = 0; i < piece.size(); ++i) {
      absl::StrAppend(&svg, i == 0 ? "" : " ", Px(x.At(piece[i].x)), ",", Px(y.At(piece[i].y)));
    }
    absl::StrAppend(&svg, "\"/>");
  }
  return svg;
}

// A point alone is drawn even where a curve has no points, lest it be lost.
std::string PointsSvg(const LineChart& chart, const Curve& curve, const AxisMap& x, const AxisMap& y) {
  std::string svg;
  for (const std::vector<ChartPoint>& piece : Pieces(curve, x, y)) {
    if (curve.draw == Draw::kLine && piece.size() > 1) continue;
    for (const ChartPoint& point : piece) {
      const std::string title = absl::StrCat(curve.label, curve.label.empty() ? "" : ": ", x.Text(point.x),
                                             " ", chart.x.title, ", ", y.Text(point.y), " ", chart.y.title);
      absl::StrAppend(&svg,
                      PointSvg(x.At(point.x), y.At(point.y), curve.color, "dot " + ClassOf(curve), title));
    }
  }
  return svg;
}

// Labels beside the last points, apart from each other.
std::string EndLabels(const LineChart& chart, const AxisMap& x, const AxisMap& y, const Plot& plot) {
  struct EndLabel {
    double x, y, at;
    const Curve* curve;
  };
  std::vector<EndLabel> labels;
  for (const Curve& curve : chart.curves) {
    const auto pieces = Pieces(curve, x, y);
    if (curve.end_label.empty() || pieces.empty()) continue;
    const ChartPoint& last = pieces.back().back();
    labels.push_back({x.At(last.x), y.At(last.y), y.At(last.y), &curve});
  }
  std::stable_sort(labels.begin(), labels.end(), [](const auto& a, const auto& b) { return a.y < b.y; });
  double free = plot.top;
  for (EndLabel& label : labels) {
    label.at = std::max(label.at, free);
    free = label.at + kLabelHeight;
  }
  double below = plot.bottom;
  for (size_t i = labels.size(); i-- > 0;) {
    labels[i].at = std::min(labels[i].at, below);
    below = labels[i].at - kLabelHeight;
  }
  std::string svg;
  for (const EndLabel& label : labels) {
    const double from = plot.right + 14;
    if (from - label.x > 24 || std::abs(label.at - label.y) > 3) {
      absl::StrAppend(&svg, "<line class=\"lead c", label.curve->color % kChartColors, "\" x1=\"",
                      Px(label.x + 7), "\" y1=\"", Px(label.y), "\" x2=\"", Px(from - 2), "\" y2=\"",
                      Px(label.at), "\"/>");
    }
    absl::StrAppend(&svg,
                    TextAt(from, label.at + 4, absl::StrCat("end-label c", label.curve->color % kChartColors),
                           label.curve->end_label));
  }
  return svg;
}

}  // namespace

std::string Svg(const LineChart& chart) {
  AxisMap x(chart.x, ValuesOf(chart, &ChartPoint::x), AxisEnds::kValues, 7);
  AxisMap y(chart.y, HeightsOf(chart), AxisEnds::kTicks, 6);
  double ticks = 0, labels = 0;
  for (const double tick : y.ticks()) ticks = std::max(ticks, TextWidth(y.Text(tick)));
  for (const Curve& curve : chart.curves) labels = std::max(labels, TextWidth(curve.end_label));
  const double top = kTop + (chart.marks.empty() ? 0 : kMarkRow);
  const Plot plot{.left = ticks + 12,
                  .right = kChartWidth - (labels > 0 ? labels + 18 : 12),
                  .top = top,
                  .bottom = top + kPlotHeight};
  x.SetPixels(plot.left + kInset, plot.right - kInset);
  y.SetPixels(plot.bottom, plot.top);

  std::string svg = OpenSvg(plot.bottom + kBottom, chart.title, chart.description);
  for (const Curve& curve : chart.curves) {
    if (curve.look == Look::kArea) absl::StrAppend(&svg, BandSvg(curve, x, y));
  }
  absl::StrAppend(&svg, Grid(chart, x, y, plot), MarksSvg(chart, x, plot));
  for (const Curve& curve : chart.curves) {
    if (curve.look != Look::kArea) absl::StrAppend(&svg, BandSvg(curve, x, y), LinesSvg(curve, x, y));
  }
  for (const Curve& curve : chart.curves) {
    if (curve.look == Look::kArea || curve.look == Look::kGuide) continue;
    absl::StrAppend(&svg, PointsSvg(chart, curve, x, y));
  }
  return absl::StrCat(svg, EndLabels(chart, x, y, plot), "</svg>\n");
}

}  // namespace annulus
