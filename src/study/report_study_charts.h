#pragma once

// Figures of a study's report: charts with the tables of their numbers, over ranks and of parts of a whole.

#include <functional>
#include <string>
#include <vector>

#include "html_page.h"
#include "report_study_points.h"
#include "svg_chart.h"

namespace annulus {

// Whether there is nothing to draw against ranks.
bool HaveOneRankCount(const std::vector<SeriesPanel>& panels);

// A number of each point that is drawn against its ranks; as bars where all points have as many ranks.
struct RankMetric {
  std::string title;
  std::string unit;  // of the y axis
  Scale scale = Scale::kLinear;
  double (*value)(const StepFigures&) = nullptr;
  // What it is divided by; null: nothing.
  double (*base)(const PointSeries&, const PointResult&, Look) = nullptr;
  std::string (*text)(double) = nullptr;  // in the table
  std::string (*tick)(double) = nullptr;
  // What an ideal machine would have; empty: nothing to compare with.
  double (*ideal)(const PointSeries&, const PointResult&) = nullptr;
};
void AddRankFigure(const std::vector<SeriesPanel>& panels, const RankMetric& metric, HtmlPage* page);

// Parts of a whole of each point, as stacked bars.
struct PartMetric {
  std::string title;
  std::string unit;  // of the x axis
  std::vector<std::string> parts;
  std::function<std::vector<double>(const StepFigures&)> values;  // in units of the axis
  std::string (*tick)(double) = nullptr;
  std::vector<std::string> columns;  // of the table, after those that name the point
  std::function<std::vector<std::string>(const StepFigures&)> cells;
  std::function<std::string(const StepFigures&)> note;  // beside the bar
  std::optional<std::pair<double, std::string>> limit = {};
  std::vector<Look> looks = {Look::kMeasured, Look::kSimulated};  // that are drawn
};
void AddPartFigure(const std::vector<SeriesPanel>& panels, const PartMetric& metric, HtmlPage* page);

// How far predictions are from measurements.
struct ErrorMetric {
  std::string title;
  Axis x;  // measured
  std::function<double(const StepFigures&)> value;
  std::string (*text)(double) = nullptr;
};
void AddErrorFigure(const std::vector<SeriesPanel>& panels, const ErrorMetric& metric, HtmlPage* page);

}  // namespace annulus
