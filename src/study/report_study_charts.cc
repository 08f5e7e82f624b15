#include "report_study_charts.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "annulus/train/report.h"
#include "report_text.h"

namespace annulus {
namespace {

using Swatch = LegendEntry::Swatch;
using Align = HtmlTable::Align;

constexpr size_t kGroupsInChart = 12;  // so that a chart fits on a page
constexpr int kGray = kChartColors - 1;
constexpr size_t kLetters = 14;  // of a label beside a line

const std::optional<StepFigures>& FiguresOf(const PointResult& point, Look look) {
  return look == Look::kMeasured ? point.measured : point.predicted;
}

bool AnyMeasured(const std::vector<SeriesPanel>& panels) {
  bool any = false;
  ForEachPoint(panels,
               [&](const auto&, const auto&, const PointResult& p) { any |= p.measured.has_value(); });
  return any;
}

bool AnySimulated(const std::vector<SeriesPanel>& panels) {
  bool any = false;
  ForEachPoint(panels,
               [&](const auto&, const auto&, const PointResult& p) { any |= p.predicted.has_value(); });
  return any;
}

bool HaveLabels(const std::vector<SeriesPanel>& panels) {
  return panels.size() > 1 || (panels.size() == 1 && panels[0].series.size() > 1);
}

// Beside its line a series has its label, where that is short; else a letter, which the legend explains.
bool LabelsAreShort(const std::vector<SeriesPanel>& panels) {
  return std::all_of(panels.begin(), panels.end(), [](const SeriesPanel& panel) {
    return std::all_of(panel.series.begin(), panel.series.end(),
                       [](const PointSeries& series) { return series.label.size() <= kLetters; });
  });
}

std::string LetterOf(const PointSeries& series) { return std::string(1, 'A' + series.color % kChartColors); }

// Of series in the order in which they come; those of other panels with the same label are the same.
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

void AddLineLegend(const std::vector<SeriesPanel>& panels, std::vector<LegendEntry>* legend) {
  if (AnyMeasured(panels)) legend->push_back({Swatch::kMeasured, kGray, "measured: filled, solid"});
  if (AnySimulated(panels)) legend->push_back({Swatch::kSimulated, kGray, "simulated: hollow, dashed"});
}

void AddBarLegend(const std::vector<SeriesPanel>& panels, std::vector<LegendEntry>* legend) {
  if (AnyMeasured(panels)) legend->push_back({Swatch::kBar, kGray, "measured: filled"});
  if (AnySimulated(panels)) legend->push_back({Swatch::kSimulatedBar, kGray, "simulated: pale, dashed"});
}

std::vector<std::string> PointCells(const SeriesPanel& panel, const PointSeries& series,
                                    const PointResult& point, bool labels) {
  std::vector<std::string> cells = {absl::StrCat(point.point.ranks)};
  if (labels) {
    cells.push_back(
        absl::StrCat(panel.label, panel.label.empty() || series.label.empty() ? "" : ", ", series.label));
  }
  return cells;
}

std::vector<HtmlTable::Column> PointColumns(bool labels) {
  std::vector<HtmlTable::Column> columns = {{"ranks", Align::kNumber}};
  if (labels) columns.push_back({"series", Align::kText});
  return columns;
}

// Of a point that has such figures.
double ValueOf(const RankMetric& metric, const PointSeries& series, const PointResult& point, Look look) {
  const double value = metric.value(*FiguresOf(point, look));
  return metric.base == nullptr ? value : value / metric.base(series, point, look);
}

HtmlTable RankTable(const std::vector<SeriesPanel>& panels, const RankMetric& metric) {
  const bool labels = HaveLabels(panels);
  HtmlTable table{
      .caption = absl::StrCat(metric.title, ", ", metric.unit), .columns = PointColumns(labels), .rows = {}};
  for (const char* name : {kMeasuredText, kSimulatedText}) table.columns.push_back({name, Align::kNumber});
  if (metric.ideal) table.columns.push_back({"ideal", Align::kNumber});
  ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
    std::vector<std::string> row = PointCells(panel, series, point, labels);
    for (const Look look : {Look::kMeasured, Look::kSimulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      row.push_back(figures.has_value() ? metric.text(ValueOf(metric, series, point, look)) : kNone);
    }
    if (metric.ideal) row.push_back(metric.text(metric.ideal(series, point)));
    if (point.measured.has_value() || point.predicted.has_value()) table.rows.push_back(std::move(row));
  });
  return table;
}

struct SeriesCurves {
  Curve ideal, measured, simulated;
};

SeriesCurves CurvesOf(const RankMetric& metric, const PointSeries& series, const std::string& end_label) {
  SeriesCurves curves;
  for (Curve* curve : {&curves.ideal, &curves.measured, &curves.simulated}) curve->color = series.color;
  const std::string of = series.label.empty() ? "" : series.label + ", ";
  curves.ideal.look = Look::kGuide;
  curves.measured.label = of + kMeasuredText;
  curves.simulated.label = of + kSimulatedText;
  curves.simulated.look = Look::kSimulated;
  for (const PointResult* point : series.points) {
    const double ranks = static_cast<double>(point->point.ranks);
    const bool drawn = point->measured.has_value() || point->predicted.has_value();
    if (metric.ideal && drawn) curves.ideal.data.push_back({.x = ranks, .y = metric.ideal(series, *point)});
    for (Curve* curve : {&curves.measured, &curves.simulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(*point, curve->look);
      if (!figures.has_value()) continue;
      curve->data.push_back({.x = ranks, .y = ValueOf(metric, series, *point, curve->look)});
    }
  }
  const auto last = [](const Curve& curve) { return curve.data.empty() ? 0 : curve.data.back().x; };
  Curve& longer = last(curves.simulated) > last(curves.measured) ? curves.simulated : curves.measured;
  longer.end_label = end_label;
  return curves;
}

LineChart RankChart(const SeriesPanel& panel, const RankMetric& metric, bool short_labels) {
  LineChart chart{.title = absl::StrCat(metric.title, panel.label.empty() ? "" : ", ", panel.label),
                  .description = absl::StrCat(metric.title, " in ", metric.unit, " against ranks, ",
                                              CountText(static_cast<int64_t>(panel.series.size()), "line"),
                                              "; the table after the chart has the numbers."),
                  .x = {.title = "ranks", .scale = Scale::kLog2},
                  .y = {.title = metric.unit, .scale = metric.scale, .text = metric.tick},
                  .curves = {},
                  .marks = {}};
  for (const PointSeries& series : panel.series) {
    const std::string label = series.label.empty() ? "" : short_labels ? series.label : LetterOf(series);
    for (SeriesCurves curves = CurvesOf(metric, series, label);
         Curve* curve : {&curves.ideal, &curves.measured, &curves.simulated}) {
      if (!curve->data.empty()) chart.curves.push_back(std::move(*curve));
    }
  }
  return chart;
}

// All panels show the same values, so that they can be compared.
void ShareAxes(std::vector<LineChart>* charts) {
  std::optional<double> x_from, x_to, from, to;
  const auto widen = [](double value, std::optional<double>* low, std::optional<double>* high) {
    if (!std::isfinite(value) || value <= 0) return;
    *low = std::min(low->value_or(value), value);
    *high = std::max(high->value_or(value), value);
  };
  for (const LineChart& chart : *charts) {
    for (const Curve& curve : chart.curves) {
      for (const ChartPoint& point : curve.data) {
        widen(point.x, &x_from, &x_to);
        widen(point.y, &from, &to);
      }
    }
  }
  for (LineChart& chart : *charts) {
    chart.x.from = x_from, chart.x.to = x_to;
    chart.y.from = chart.y.scale == Scale::kLinear ? 0 : from;
    chart.y.to = to;
  }
}

// Points of a panel, as many as a chart has room for.
struct BarPage {
  const SeriesPanel* panel;
  std::string title;
  std::vector<std::pair<const PointSeries*, const PointResult*>> points;
};

std::vector<BarPage> BarPagesOf(const std::vector<SeriesPanel>& panels) {
  std::vector<BarPage> pages;
  for (const SeriesPanel& panel : panels) {
    const size_t first = pages.size();
    size_t in_panel = 0;
    for (const PointSeries& series : panel.series) {
      for (const PointResult* point : series.points) {
        if (!point->measured.has_value() && !point->predicted.has_value()) continue;
        if (in_panel++ % kGroupsInChart == 0) pages.push_back({&panel, panel.label, {}});
        pages.back().points.emplace_back(&series, point);
      }
    }
    const size_t count = pages.size() - first;
    for (size_t i = first; count > 1 && i < pages.size(); ++i) {
      absl::StrAppend(&pages[i].title, pages[i].title.empty() ? "part " : ", part ", i - first + 1, " of ",
                      count);
    }
  }
  return pages;
}

BarChart PartChart(const BarPage& bars, const PartMetric& metric, double most) {
  BarChart chart{.title = absl::StrCat(metric.title, bars.title.empty() ? "" : ", ", bars.title),
                 .description = absl::StrCat(metric.title, " as stacked bars of ",
                                             CountText(static_cast<int64_t>(bars.points.size()), "point"),
                                             "; the table after the chart has the numbers."),
                 .x = {.title = metric.unit, .text = metric.tick, .from = 0, .to = most},
                 .parts = metric.parts,
                 .groups = {},
                 .limit = metric.limit};
  for (const auto& [series, point] : bars.points) {
    const std::string label = series->label;
    BarGroup group{
        .label = absl::StrCat(CountText(point->point.ranks, "rank"), label.empty() ? "" : ", ", label),
        .bars = {}};
    for (const Look look : {Look::kMeasured, Look::kSimulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(*point, look);
      if (!figures.has_value()) continue;
      group.bars.push_back({.parts = metric.values(*figures), .look = look, .note = metric.note(*figures)});
    }
    chart.groups.push_back(std::move(group));
  }
  return chart;
}

HtmlTable PartTable(const std::vector<SeriesPanel>& panels, const PartMetric& metric) {
  const bool labels = HaveLabels(panels);
  HtmlTable table{.caption = metric.title, .columns = PointColumns(labels), .rows = {}};
  table.columns.push_back({"how", Align::kText});
  for (const std::string& name : metric.columns) table.columns.push_back({name, Align::kNumber});
  ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
    for (const Look look : {Look::kMeasured, Look::kSimulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      if (!figures.has_value()) continue;
      std::vector<std::string> row = PointCells(panel, series, point, labels);
      row.push_back(look == Look::kMeasured ? kMeasuredText : kSimulatedText);
      const std::vector<std::string> cells = metric.cells(*figures);
      row.insert(row.end(), cells.begin(), cells.end());
      table.rows.push_back(std::move(row));
    }
  });
  return table;
}

double MostOf(const std::vector<SeriesPanel>& panels, const PartMetric& metric) {
  double most = 0;
  ForEachPoint(panels, [&](const SeriesPanel&, const PointSeries&, const PointResult& point) {
    for (const Look look : {Look::kMeasured, Look::kSimulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      if (!figures.has_value()) continue;
      double sum = 0;
      for (const double part : metric.values(*figures)) sum += std::isfinite(part) ? part : 0;
      most = std::max(most, sum);
    }
  });
  return most;
}

struct Errors {
  HtmlTable table;
  LineChart chart;
  std::vector<double> sizes;  // of all errors, without their signs
  std::string worst;          // the point with the largest
  double low = 0, high = 0;   // measured values
};

void AddErrors(const SeriesPanel& panel, const PointSeries& series, const ErrorMetric& metric, bool labels,
               Errors* errors) {
  Curve curve{.label = series.label, .color = series.color, .draw = Draw::kPoints, .data = {}};
  for (const PointResult* point : series.points) {
    if (!point->measured.has_value() || !point->predicted.has_value()) continue;
    const double measured = metric.value(*point->measured), predicted = metric.value(*point->predicted);
    const double error = predicted / measured - 1;
    if (!(measured > 0) || !(predicted > 0) || !std::isfinite(error)) continue;
    std::vector<std::string> row = PointCells(panel, series, *point, labels);
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
         .color = kGray,
         .look = Look::kGuide,
         .data = {{.x = errors->low, .y = share}, {.x = errors->high, .y = share}}});
  }
}

double MedianOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

void AddBars(const std::vector<SeriesPanel>& panels, const RankMetric& metric, HtmlPage* page) {
  AddPartFigure(
      panels,
      {.title = metric.title,
       .unit = metric.unit,
       .parts = {metric.title},
       .values = [&](const StepFigures& f) { return std::vector<double>{metric.value(f)}; },
       .tick = metric.tick,
       .columns = {metric.unit},
       .cells = [&](const StepFigures& f) { return std::vector<std::string>{metric.text(metric.value(f))}; },
       .note = [&](const StepFigures& f) { return metric.text(metric.value(f)); }},
      page);
}

}  // namespace

bool HaveOneRankCount(const std::vector<SeriesPanel>& panels) {
  std::set<int64_t> ranks;
  ForEachPoint(panels, [&](const auto&, const auto&, const PointResult& p) { ranks.insert(p.point.ranks); });
  return ranks.size() <= 1;
}

void AddRankFigure(const std::vector<SeriesPanel>& panels, const RankMetric& metric, HtmlPage* page) {
  if (HaveOneRankCount(panels)) return AddBars(panels, metric, page);
  std::vector<LineChart> charts;
  const bool short_labels = LabelsAreShort(panels);
  for (const SeriesPanel& panel : panels) charts.push_back(RankChart(panel, metric, short_labels));
  ShareAxes(&charts);
  std::vector<HtmlPage::Panel> drawn;
  for (size_t i = 0; i < charts.size(); ++i) drawn.push_back({panels[i].label, Svg(charts[i])});
  std::vector<LegendEntry> legend = SeriesLegend(panels);
  AddLineLegend(panels, &legend);
  if (metric.ideal) legend.push_back({Swatch::kGuide, kGray, "ideal"});
  page->Figure(drawn, legend, RankTable(panels, metric));
}

void AddPartFigure(const std::vector<SeriesPanel>& panels, const PartMetric& metric, HtmlPage* page) {
  std::vector<HtmlPage::Panel> drawn;
  const double most = MostOf(panels, metric);
  for (const BarPage& bars : BarPagesOf(panels))
    drawn.push_back({bars.title, Svg(PartChart(bars, metric, most))});
  std::vector<LegendEntry> legend;
  for (size_t i = 0; metric.parts.size() > 1 && i < metric.parts.size(); ++i)
    legend.push_back({Swatch::kBar, static_cast<int>(i), metric.parts[i]});
  AddBarLegend(panels, &legend);
  page->Figure(drawn, legend, PartTable(panels, metric));
}

void AddErrorFigure(const std::vector<SeriesPanel>& panels, const ErrorMetric& metric, HtmlPage* page) {
  const bool labels = HaveLabels(panels);
  Errors errors{
      .table = {.caption = absl::StrCat(metric.title, ": predicted against measured"),
                .columns = PointColumns(labels),
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
    for (const PointSeries& series : panel.series) AddErrors(panel, series, metric, labels, &errors);
  }
  if (errors.sizes.empty()) return;
  AddErrorGuides(&errors);
  const double worst = *std::max_element(errors.sizes.begin(), errors.sizes.end());
  page->Paragraph(absl::StrFormat("%s: off by %s in the median and %s at worst (%s), of %s.", metric.title,
                                  PercentText(MedianOf(errors.sizes)), PercentText(worst), errors.worst,
                                  CountText(static_cast<int64_t>(errors.sizes.size()), "point")));
  page->Figure({{metric.title, Svg(errors.chart)}}, SeriesLegend(panels), errors.table);
}

}  // namespace annulus
