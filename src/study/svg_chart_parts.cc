#include "svg_chart_parts.h"

#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "html_page.h"
#include "svg_chart_axis.h"

namespace annulus {
namespace {

// A regular polygon with these corners, the first at this angle; none: a circle.
struct Shape {
  int corners;
  double turns, radius;
};
constexpr std::array<Shape, kChartColors> kShapes = {{{0, 0, 4.5},
                                                      {4, 0.125, 5.6},
                                                      {3, -0.25, 6},
                                                      {4, 0, 6},
                                                      {3, 0.25, 6},
                                                      {6, 0, 5.3},
                                                      {3, 0, 6},
                                                      {5, -0.25, 5.4}}};

}  // namespace

std::string OpenSvg(double height, const std::string& title, const std::string& description) {
  return absl::StrCat("<svg class=\"chart\" role=\"img\" viewBox=\"0 0 ", Px(kChartWidth), " ", Px(height),
                      "\"><title>", Escaped(title), "</title><desc>", Escaped(description), "</desc>");
}

std::string TextAt(double x, double y, const std::string& classes, const std::string& text) {
  return absl::StrCat("<text class=\"", classes, "\" x=\"", Px(x), "\" y=\"", Px(y), "\">", Escaped(text),
                      "</text>");
}

std::string PointSvg(double x, double y, int shape, const std::string& classes, const std::string& title) {
  const Shape& form = kShapes[static_cast<size_t>(shape % kChartColors)];
  const std::string named = title.empty() ? "" : absl::StrCat("<title>", Escaped(title), "</title>");
  if (form.corners == 0) {
    return absl::StrCat("<circle class=\"", classes, "\" cx=\"", Px(x), "\" cy=\"", Px(y), "\" r=\"",
                        Px(form.radius), "\">", named, "</circle>");
  }
  std::string points;
  for (int i = 0; i < form.corners; ++i) {
    const double angle = 2 * M_PI * (form.turns + static_cast<double>(i) / form.corners);
    absl::StrAppend(&points, i == 0 ? "" : " ", Px(x + form.radius * std::cos(angle)), ",",
                    Px(y + form.radius * std::sin(angle)));
  }
  return absl::StrCat("<polygon class=\"", classes, "\" points=\"", points, "\">", named, "</polygon>");
}

std::string LegendHtml(const std::vector<LegendEntry>& entries) {
  using Swatch = LegendEntry::Swatch;
  std::string html = "<ul class=\"legend\">";
  for (const LegendEntry& entry : entries) {
    const std::string color = absl::StrCat("c", entry.color % kChartColors);
    const bool simulated = entry.swatch == Swatch::kSimulated || entry.swatch == Swatch::kSimulatedBar;
    const char* look = simulated ? "simulated " : entry.swatch == Swatch::kGuide ? "guide " : "measured ";
    const bool of_series = entry.swatch == Swatch::kSeries;
    std::string swatch;
    if (entry.swatch == Swatch::kBar || entry.swatch == Swatch::kSimulatedBar) {
      swatch =
          absl::StrCat("<rect class=\"bar ", look, color, "\" x=\"4\" y=\"2\" width=\"20\" height=\"12\"/>");
    } else {
      swatch = absl::StrCat("<line class=\"line ", look, color, "\" x1=\"0\" x2=\"28\" y1=\"8\" y2=\"8\"/>");
      if (entry.swatch != Swatch::kGuide)
        absl::StrAppend(&swatch,
                        PointSvg(14, 8, of_series ? entry.color : 0, absl::StrCat("dot ", look, color), ""));
    }
    absl::StrAppend(&html, "<li><svg class=\"swatch\" aria-hidden=\"true\" viewBox=\"0 0 28 16\">", swatch,
                    "</svg>", Escaped(entry.text), "</li>");
  }
  return absl::StrCat(html, "</ul>\n");
}

}  // namespace annulus
