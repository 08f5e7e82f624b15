#include "report_choice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "annulus/base/median.h"
#include "annulus/train/report.h"
#include "report_series.h"
#include "report_text.h"

namespace annulus {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool IsOfLayout(const std::string& axis) {
  static const std::set<std::string> names = {
      "dp", "cp", "tp", "plan", "transport", "recompute", "optim.micro_batch"};
  return names.count(axis) > 0 || absl::StartsWith(axis, "parallel.");
}

bool IsOfCase(const std::string& axis) { return !IsOfLayout(axis); }

// With weak scaling layouts may differ in the work of a step.
double SecondsPerToken(const PointResult& point, const std::optional<StepFigures>& figures) {
  if (!figures.has_value() || point.tokens_per_step <= 0 || !(figures->step_seconds > 0)) return kInfinity;
  return figures->step_seconds / static_cast<double>(point.tokens_per_step);
}

double Measured(const PointResult& point) { return SecondsPerToken(point, point.measured); }
double Predicted(const PointResult& point) { return SecondsPerToken(point, point.predicted); }

template <typename Seconds>
const PointResult* Fastest(const std::vector<const PointResult*>& points, Seconds&& seconds) {
  return *std::min_element(points.begin(), points.end(), [&](const PointResult* a, const PointResult* b) {
    return seconds(*a) < seconds(*b);
  });
}

LayoutCase CaseOf(const std::vector<const PointResult*>& points) {
  LayoutCase made{.label = LabelsText(*points.front(), IsOfCase),
                  .choice = Fastest(points, Predicted),
                  .best = Fastest(points, Measured),
                  .measured = std::count_if(points.begin(), points.end(), [](const PointResult* point) {
                    return Measured(*point) < kInfinity;
                  })};
  made.slower_by = Measured(*made.choice) / Measured(*made.best) - 1;
  return made;
}

bool WasRun(const LayoutCase& layouts) {
  const bool run = Measured(*layouts.choice) < kInfinity || layouts.choice->state == PointState::kFailed;
  return layouts.measured >= 2 && Predicted(*layouts.choice) < kInfinity && run;
}

}  // namespace

std::vector<LayoutCase> LayoutCases(const StudyResults& results) {
  std::vector<std::vector<const PointResult*>> groups;
  std::map<std::vector<std::string>, size_t> index;
  for (const PointResult& point : results.points) {
    std::vector<std::string> values;
    for (const StudyPoint::Label& label : point.point.labels) {
      if (IsOfCase(label.axis)) values.push_back(label.value);
    }
    const auto [at, is_new] = index.emplace(values, groups.size());
    if (is_new) groups.emplace_back();
    groups[at->second].push_back(&point);
  }
  std::vector<LayoutCase> cases;
  for (const auto& points : groups) {
    LayoutCase layouts = CaseOf(points);
    if (WasRun(layouts)) cases.push_back(std::move(layouts));
  }
  return cases;
}

std::string LayoutText(const PointResult& point) { return LabelsText(point, IsOfLayout); }

std::string ChoiceText(const std::vector<LayoutCase>& cases) {
  if (cases.empty()) return "";
  std::vector<double> slower;
  for (const LayoutCase& layouts : cases) slower.push_back(layouts.slower_by);
  const auto worst = std::max_element(slower.begin(), slower.end());
  return absl::StrCat("planner's choice against the best measured layout: ", PercentText(Median(slower)),
                      " slower in the median and ", PercentText(*worst), " at worst (",
                      cases[static_cast<size_t>(worst - slower.begin())].label, "), of ",
                      CountText(static_cast<int64_t>(cases.size()), "case"));
}

}  // namespace annulus
