#include "report_study_points.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace annulus {
namespace {

using Swatch = LegendEntry::Swatch;
using Align = HtmlTable::Align;

constexpr size_t kLetters = 14;  // of a label beside a line

}  // namespace

bool HaveLabels(const std::vector<SeriesPanel>& panels) {
  return panels.size() > 1 || (panels.size() == 1 && panels[0].series.size() > 1);
}

bool LabelsAreShort(const std::vector<SeriesPanel>& panels) {
  return std::all_of(panels.begin(), panels.end(), [](const SeriesPanel& panel) {
    return std::all_of(panel.series.begin(), panel.series.end(),
                       [](const PointSeries& series) { return series.label.size() <= kLetters; });
  });
}

std::string LetterOf(const PointSeries& series) { return std::string(1, 'A' + series.color % kChartColors); }

std::vector<LegendEntry> SeriesLegend(const std::vector<SeriesPanel>& panels) {
  std::vector<LegendEntry> legend;
  const bool letters = !LabelsAreShort(panels);
  ForEachPoint(panels, [&](const SeriesPanel&, const PointSeries& series, const PointResult&) {
    if (series.label.empty()) return;
    const std::string text = absl::StrCat(letters ? LetterOf(series) + ": " : "", series.label);
    const bool known = std::any_of(legend.begin(), legend.end(), [&](const LegendEntry& entry) {
      return entry.text == text && entry.color == series.color;
    });
    if (!known) legend.push_back({Swatch::kSeries, series.color, text});
  });
  return legend;
}

std::vector<std::string> PointCells(const std::vector<SeriesPanel>& panels, const SeriesPanel& panel,
                                    const PointSeries& series, const PointResult& point) {
  std::vector<std::string> cells = {absl::StrCat(point.point.ranks)};
  if (HaveLabels(panels)) {
    cells.push_back(
        absl::StrCat(panel.label, panel.label.empty() || series.label.empty() ? "" : ", ", series.label));
  }
  return cells;
}

std::vector<HtmlTable::Column> PointColumns(const std::vector<SeriesPanel>& panels) {
  std::vector<HtmlTable::Column> columns = {{"ranks", Align::kNumber}};
  if (HaveLabels(panels)) columns.push_back({"series", Align::kText});
  return columns;
}

}  // namespace annulus
