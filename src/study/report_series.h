#pragma once

// Which points of a study belong to one line of a chart over ranks, and which lines to one chart.

#include <string>
#include <vector>

#include "annulus/study/study.h"

namespace annulus {

// Points that differ in their ranks alone, ascending.
struct PointSeries {
  std::string label;  // "seq_len 32768, plan kv_ring"; empty: there is only one
  int color = 0;
  std::vector<const PointResult*> points;
};

// Series that share a chart: at most kChartColors of them.
struct SeriesPanel {
  std::string label;  // empty: there is only one
  std::vector<PointSeries> series;
};

// One series for each combination of the axes that do not make the number of ranks. Too many for one chart
// are grouped by their first axis, then by the second too, and so on. `results` outlives them.
std::vector<SeriesPanel> PanelsOf(const StudyResults& results);

// "8 ranks, seq_len 32768"
std::string PointText(const SeriesPanel& panel, const PointSeries& series, const PointResult& point);

// "cp 2, recompute NONE": the point's values on the axes for which `shown` is true.
std::string LabelsText(const PointResult& point, bool (*shown)(const std::string& axis));

}  // namespace annulus
