#pragma once

// What all figures of a study have in common: how tables and legends name points and their series.

#include <string>
#include <vector>

#include "html_page.h"
#include "report_series.h"
#include "svg_chart.h"

namespace annulus {

inline constexpr char kMeasuredText[] = "measured", kSimulatedText[] = "simulated";

// Calls fn(panel, series, point) for all points, panel by panel.
template <typename Fn>
void ForEachPoint(const std::vector<SeriesPanel>& panels, Fn&& fn) {
  for (const SeriesPanel& panel : panels) {
    for (const PointSeries& series : panel.series) {
      for (const PointResult* point : series.points) fn(panel, series, *point);
    }
  }
}

// Whether tables need a column that names series.
bool HaveLabels(const std::vector<SeriesPanel>& panels);

// Beside its line a series has its label, where that is short; else a letter, which the legend explains.
bool LabelsAreShort(const std::vector<SeriesPanel>& panels);
std::string LetterOf(const PointSeries& series);

// Of series in the order in which they come; those of other panels with the same label are the same.
std::vector<LegendEntry> SeriesLegend(const std::vector<SeriesPanel>& panels);

// The first columns of a table whose rows are points.
std::vector<HtmlTable::Column> PointColumns(const std::vector<SeriesPanel>& panels);
std::vector<std::string> PointCells(const std::vector<SeriesPanel>& panels, const SeriesPanel& panel,
                                    const PointSeries& series, const PointResult& point);

}  // namespace annulus
