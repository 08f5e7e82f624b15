// How far predictions are from measurements, with lines where they are off by 5% and 10%.

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "report_study_charts.h"
#include "report_text.h"

namespace annulus {
namespace {

using Align = HtmlTable::Align;

struct Errors {
  HtmlTable table;
  LineChart chart;
  std::vector<double> sizes;  // of all errors, without their signs
  std::string worst;          // the point with the largest
  double low = 0, high = 0;   // measured values
};

void AddErrors(const std::vector<SeriesPanel>& panels, const SeriesPanel& panel, const PointSeries& series,
               const ErrorMetric& metric, Errors* errors) {
  Curve curve{.label = series.label, .color = series.color, .draw = Draw::kPoints, .data = {}};
  for (const PointResult* point : series.points) {
    if (!point->measured.has_value() || !point->predicted.has_value()) continue;
    const double measured = metric.value(*point->measured), predicted = metric.value(*point->predicted);
    const double error = predicted / measured - 1;
    if (!(measured > 0) || !(predicted > 0) || !std::isfinite(error)) continue;
    std::vector<std::string> row = PointCells(panels, panel, series, *point);
    for (const std::string& cell : {metric.text(measured), metric.text(predicted), ErrorText(error)})
      row.push_back(cell);
    errors->table.rows.push_back(std::move(row));
    const bool first = errors->sizes.empty();
    errors->low = first ? measured : std::min(errors->low, measured);
    errors->high = std::max(errors->high, measured);
    if (first || std::abs(error) > *std::max_element(errors->sizes.begin(), errors->sizes.end()))
      errors->worst = PointText(panel, series, *point);
    errors->sizes.push_back(std::abs(error));
    curve.data.push_back({.x = measured, .y = error});
  }
  std::stable_sort(curve.data.begin(), curve.data.end(),
                   [](const ChartPoint& a, const ChartPoint& b) { return a.x < b.x; });
  if (!curve.data.empty()) errors->chart.curves.push_back(std::move(curve));
}

void AddErrorGuides(Errors* errors) {
  for (const double share : {-0.10, -0.05, 0.0, 0.05, 0.10}) {
    errors->chart.curves.push_back(
        {.end_label = share == 0 ? "exact" : absl::StrFormat("%+.0f%%", 100 * share),
         .color = kChartColors - 1,
         .look = Look::kGuide,
         .data = {{.x = errors->low, .y = share}, {.x = errors->high, .y = share}}});
  }
}

}  // namespace

void AddErrorFigure(const std::vector<SeriesPanel>& panels, const ErrorMetric& metric, HtmlPage* page) {
  Errors errors{
      .table = {.caption = absl::StrCat(metric.title, ": predicted against measured"),
                .columns = PointColumns(panels),
                .rows = {}},
      .chart = {.title = absl::StrCat("Error of the predicted ", metric.title),
                .description = "Predicted over measured, less one, against measured.",
                .x = metric.x,
                .y = {.title = "predicted against measured", .text = PercentTick, .from = -0.11, .to = 0.11},
                .curves = {},
                .marks = {}},
      .sizes = {},
      .worst = {}};
  for (const char* name : {kMeasuredText, "predicted", "error"})
    errors.table.columns.push_back({name, Align::kNumber});
  for (const SeriesPanel& panel : panels) {
    for (const PointSeries& series : panel.series) AddErrors(panels, panel, series, metric, &errors);
  }
  if (errors.sizes.empty()) return;
  AddErrorGuides(&errors);
  page->Paragraph(absl::StrCat(metric.title, ": ", ErrorsText(errors.sizes, errors.worst), "."));
  page->Figure({{metric.title, Svg(errors.chart)}}, SeriesLegend(panels), errors.table);
}

}  // namespace annulus
