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

const std::optional<StepFigures>& FiguresOf(const PointResult& point, Look look) {
  return look == Look::kMeasured ? point.measured : point.predicted;
}

bool HasAny(const PointResult& point, const std::vector<Look>& looks) {
  return std::any_of(looks.begin(), looks.end(),
                     [&](Look look) { return FiguresOf(point, look).has_value(); });
}

bool AnyPointHas(const std::vector<SeriesPanel>& panels, Look look) {
  bool any = false;
  ForEachPoint(panels, [&](const auto&, const auto&, const PointResult& p) { any |= HasAny(p, {look}); });
  return any;
}

void AddLookLegend(const std::vector<SeriesPanel>& panels, std::vector<LegendEntry>* legend) {
  if (AnyPointHas(panels, Look::kMeasured))
    legend->push_back({Swatch::kMeasured, kGray, "measured: filled, solid"});
  if (AnyPointHas(panels, Look::kSimulated))
    legend->push_back({Swatch::kSimulated, kGray, "simulated: hollow, dashed"});
}

void AddBarLegend(const std::vector<SeriesPanel>& panels, const std::vector<Look>& looks,
                  std::vector<LegendEntry>* legend) {
  for (const Look look : looks) {
    if (!AnyPointHas(panels, look)) continue;
    const bool measured = look == Look::kMeasured;
    legend->push_back({measured ? Swatch::kBar : Swatch::kSimulatedBar, kGray,
                       measured ? "measured: filled" : "simulated: pale, dashed"});
  }
}

// Of a point that has such figures.
double ValueOf(const RankMetric& metric, const PointSeries& series, const PointResult& point, Look look) {
  const double value = metric.value(*FiguresOf(point, look));
  return metric.base == nullptr ? value : value / metric.base(series, point, look);
}

HtmlTable RankTable(const std::vector<SeriesPanel>& panels, const RankMetric& metric) {
  HtmlTable table{
      .caption = absl::StrCat(metric.title, ", ", metric.unit), .columns = PointColumns(panels), .rows = {}};
  for (const char* name : {kMeasuredText, kSimulatedText}) table.columns.push_back({name, Align::kNumber});
  if (metric.ideal) table.columns.push_back({"ideal", Align::kNumber});
  ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
    std::vector<std::string> row = PointCells(panels, panel, series, point);
    for (const Look look : {Look::kMeasured, Look::kSimulated}) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      row.push_back(figures.has_value() ? metric.text(ValueOf(metric, series, point, look)) : kNone);
    }
    if (metric.ideal) row.push_back(metric.text(metric.ideal(series, point)));
    if (HasAny(point, {Look::kMeasured, Look::kSimulated})) table.rows.push_back(std::move(row));
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
    const bool drawn = HasAny(*point, {Look::kMeasured, Look::kSimulated});
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

std::vector<BarPage> BarPagesOf(const std::vector<SeriesPanel>& panels, const PartMetric& metric) {
  std::vector<BarPage> pages;
  for (const SeriesPanel& panel : panels) {
    const size_t first = pages.size();
    size_t in_panel = 0;
    for (const PointSeries& series : panel.series) {
      for (const PointResult* point : series.points) {
        if (!HasAny(*point, metric.looks)) continue;
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
    for (const Look look : metric.looks) {
      const std::optional<StepFigures>& figures = FiguresOf(*point, look);
      if (!figures.has_value()) continue;
      group.bars.push_back({.parts = metric.values(*figures), .look = look, .note = metric.note(*figures)});
    }
    chart.groups.push_back(std::move(group));
  }
  return chart;
}

HtmlTable PartTable(const std::vector<SeriesPanel>& panels, const PartMetric& metric) {
  HtmlTable table{.caption = metric.title, .columns = PointColumns(panels), .rows = {}};
  table.columns.push_back({"how", Align::kText});
  for (const std::string& name : metric.columns) table.columns.push_back({name, Align::kNumber});
  ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
    for (const Look look : metric.looks) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      if (!figures.has_value()) continue;
      std::vector<std::string> row = PointCells(panels, panel, series, point);
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
    for (const Look look : metric.looks) {
      const std::optional<StepFigures>& figures = FiguresOf(point, look);
      if (!figures.has_value()) continue;
      double sum = 0;
      for (const double part : metric.values(*figures)) sum += std::isfinite(part) ? part : 0;
      most = std::max(most, sum);
    }
  });
  return most;
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
  AddLookLegend(panels, &legend);
  if (metric.ideal) legend.push_back({Swatch::kGuide, kGray, "ideal"});
  page->Figure(drawn, legend, RankTable(panels, metric));
}

void AddPartFigure(const std::vector<SeriesPanel>& panels, const PartMetric& metric, HtmlPage* page) {
  std::vector<HtmlPage::Panel> drawn;
  const double most = MostOf(panels, metric);
  for (const BarPage& bars : BarPagesOf(panels, metric))
    drawn.push_back({bars.title, Svg(PartChart(bars, metric, most))});
  std::vector<LegendEntry> legend;
  for (size_t i = 0; metric.parts.size() > 1 && i < metric.parts.size(); ++i)
    legend.push_back({Swatch::kBar, static_cast<int>(i), metric.parts[i]});
  AddBarLegend(panels, metric.looks, &legend);
  page->Figure(drawn, legend, PartTable(panels, metric));
}

}  // namespace annulus
