#include "report_series.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "annulus/train/report.h"
#include "svg_chart.h"

namespace annulus {
namespace {

using Labels = std::vector<std::string>;  // of some axes

std::string ValueOf(const PointResult& point, const std::string& axis) {
  for (const StudyPoint::Label& label : point.point.labels) {
    if (label.axis == axis) return label.value;
  }
  return "";
}

Labels ValuesOf(const PointResult& point, const Labels& axes) {
  Labels values;
  for (const std::string& axis : axes) values.push_back(ValueOf(point, axis));
  return values;
}

Labels AxesOf(const StudyResults& results) {
  Labels axes;
  for (const PointResult& point : results.points) {
    for (const StudyPoint::Label& label : point.point.labels) {
      if (std::find(axes.begin(), axes.end(), label.axis) == axes.end()) axes.push_back(label.axis);
    }
  }
  return axes;
}

// "parallel.cp" -> "cp"
std::string ShortAxis(const std::string& axis) {
  const size_t dot = axis.rfind('.');
  return dot == std::string::npos ? axis : axis.substr(dot + 1);
}

std::string LabelOf(const Labels& axes, const Labels& values) {
  std::string text;
  for (size_t i = 0; i < axes.size(); ++i) {
    if (values[i].empty()) continue;
    absl::StrAppend(&text, text.empty() ? "" : ", ", ShortAxis(axes[i]), " ", values[i]);
  }
  return text;
}

// Whether points that are alike on `axes` all differ in ranks.
bool TellsRanksApart(const StudyResults& results, const Labels& axes) {
  std::set<std::pair<Labels, int64_t>> seen;
  return std::all_of(results.points.begin(), results.points.end(), [&](const PointResult& point) {
    return seen.emplace(ValuesOf(point, axes), point.point.ranks).second;
  });
}

bool ChangesRanks(const StudyResults& results, const std::string& axis) {
  std::map<std::string, std::set<int64_t>> ranks;
  for (const PointResult& point : results.points) ranks[ValueOf(point, axis)].insert(point.point.ranks);
  return std::any_of(ranks.begin(), ranks.end(),
                     [&](const auto& each) { return each.second != ranks.begin()->second; });
}

bool Varies(const StudyResults& results, const std::string& axis) {
  return std::any_of(results.points.begin(), results.points.end(), [&](const PointResult& point) {
    return ValueOf(point, axis) != ValueOf(results.points.front(), axis);
  });
}

// Those that tell series apart: axes that only make ranks are left out, as long as no two points fall
// together.
Labels SeriesAxes(const StudyResults& results) {
  Labels axes;
  for (const std::string& axis : AxesOf(results)) {
    if (Varies(results, axis)) axes.push_back(axis);
  }
  for (const std::string& axis : Labels(axes)) {
    Labels others;
    std::copy_if(axes.begin(), axes.end(), std::back_inserter(others),
                 [&](const std::string& other) { return other != axis; });
    if (ChangesRanks(results, axis) && TellsRanksApart(results, others)) axes = others;
  }
  return axes;
}

std::vector<PointSeries> SeriesOf(const StudyResults& results, const Labels& axes) {
  std::vector<PointSeries> all;
  std::map<Labels, size_t> index;
  for (const PointResult& point : results.points) {
    const Labels values = ValuesOf(point, axes);
    const auto [at, is_new] = index.emplace(values, all.size());
    if (is_new) all.push_back({.label = LabelOf(axes, values), .points = {}});
    all[at->second].points.push_back(&point);
  }
  for (PointSeries& series : all) {
    std::stable_sort(
        series.points.begin(), series.points.end(),
        [](const PointResult* a, const PointResult* b) { return a->point.ranks < b->point.ranks; });
  }
  return all;
}

// By their values on the first `count` axes.
std::vector<SeriesPanel> Grouped(const std::vector<PointSeries>& all, const Labels& axes, size_t count) {
  const Labels first(axes.begin(), axes.begin() + static_cast<std::ptrdiff_t>(count));
  const Labels rest(axes.begin() + static_cast<std::ptrdiff_t>(count), axes.end());
  std::vector<SeriesPanel> panels;
  std::map<Labels, size_t> index;
  for (PointSeries series : all) {
    const PointResult& point = *series.points.front();
    const Labels values = ValuesOf(point, first);
    const auto [at, is_new] = index.emplace(values, panels.size());
    if (is_new) panels.push_back({.label = LabelOf(first, values), .series = {}});
    SeriesPanel& panel = panels[at->second];
    series.color = static_cast<int>(panel.series.size());
    if (count > 0) series.label = LabelOf(rest, ValuesOf(point, rest));
    panel.series.push_back(std::move(series));
  }
  return panels;
}

bool Fits(const SeriesPanel& panel) { return panel.series.size() <= kChartColors; }

// What no grouping made small enough.
std::vector<SeriesPanel> Cut(const std::vector<SeriesPanel>& panels) {
  std::vector<SeriesPanel> cut;
  for (const SeriesPanel& panel : panels) {
    for (size_t i = 0; i < panel.series.size(); ++i) {
      if (i % kChartColors == 0) cut.push_back({.label = panel.label, .series = {}});
      cut.back().series.push_back(panel.series[i]);
    }
  }
  return cut;
}

}  // namespace

std::vector<SeriesPanel> PanelsOf(const StudyResults& results) {
  if (results.points.empty()) return {};
  const Labels axes = SeriesAxes(results);
  const std::vector<PointSeries> all = SeriesOf(results, axes);
  std::vector<SeriesPanel> panels = Grouped(all, axes, 0);
  for (size_t count = 1; count < axes.size() && !std::all_of(panels.begin(), panels.end(), Fits); ++count) {
    panels = Grouped(all, axes, count);
  }
  return Cut(panels);
}

std::string PointText(const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
  std::string text = CountText(point.point.ranks, "rank");
  for (const std::string& label : {panel.label, series.label}) {
    if (!label.empty()) absl::StrAppend(&text, ", ", label);
  }
  return text;
}

std::string LabelsText(const PointResult& point, bool (*shown)(const std::string& axis)) {
  Labels axes, values;
  for (const StudyPoint::Label& label : point.point.labels) {
    if (!shown(label.axis)) continue;
    axes.push_back(label.axis);
    values.push_back(label.value);
  }
  return LabelOf(axes, values);
}

}  // namespace annulus
