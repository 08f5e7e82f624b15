#include "report_study_tables.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "annulus/train/report.h"
#include "report_choice.h"
#include "report_study_points.h"
#include "report_text.h"

namespace annulus {
namespace {

using Align = HtmlTable::Align;

template <typename Fn>
bool NoneOf(const StudyResults& results, Fn&& holds) {
  return std::none_of(results.points.begin(), results.points.end(), holds);
}

std::string StateText(const PointResult& point) {
  if (point.state != PointState::kDone) return Name(point.state);
  return point.measured.has_value() ? point.predicted.has_value() ? "measured, simulated" : kMeasuredText
                                    : kSimulatedText;
}

bool HasFailed(const PointResult& point) {
  return point.state == PointState::kFailed || point.state == PointState::kRefused;
}

// What it was measured on, and what it was predicted for.
std::string DevicesText(const PointResult& point) {
  std::vector<std::string> texts;
  if (!point.measured_on.empty()) texts.push_back(point.measured_on);
  if (point.predicted.has_value() && !point.machine.device.empty())
    texts.push_back(absl::StrCat("predicted for ", point.machine.device));
  return texts.empty() ? kNone : absl::StrJoin(texts, "; ");
}

// With what went wrong beside; why a point failed has a table of its own.
std::string StateAndReason(const PointResult& point) {
  std::string text = StateText(point);
  if (!HasFailed(point) && !point.reason.empty()) absl::StrAppend(&text, "; ", point.reason);
  if (point.predicted.has_value() && !point.predicted->documents.empty())
    absl::StrAppend(&text, "; ", point.predicted->documents);
  return text;
}

}  // namespace

void AddGoodput(const StudyResults& results, const std::vector<SeriesPanel>& panels, HtmlPage* page) {
  if (NoneOf(results, [](const PointResult& point) { return point.goodput.has_value(); })) return;
  page->Section("Goodput",
                "The share of a long run's time that steps which count took, with hosts that fail, saving, "
                "what is lost since the last save, and restarts: means of simulated histories of failures, "
                "with the standard deviation of one; beside it what is expected of the best interval.");
  HtmlTable table{.caption = "Goodput", .columns = {{"point", Align::kText}}, .rows = {}};
  for (const char* name : {"goodput", "whole run", "failures", "steps between saves", "saving", "lost",
                           "restarting", "best steps between saves", "goodput with these"})
    table.columns.push_back({name, Align::kNumber});
  ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
    if (!point.goodput.has_value()) return;
    const Goodput& g = *point.goodput;
    table.rows.push_back({PointText(panel, series, point),
                          absl::StrCat(PercentText(g.share), " +- ", PercentText(g.share_deviation)),
                          FormatDuration(g.seconds), absl::StrCat(std::llround(g.failures)),
                          absl::StrCat(g.steps_between_saves), FormatDuration(g.saving_seconds),
                          FormatDuration(g.lost_seconds), FormatDuration(g.restarting_seconds),
                          absl::StrCat(g.best_steps_between_saves), PercentText(g.best_share)});
  });
  page->Table(table);
}

void AddChoices(const StudyResults& results, HtmlPage* page) {
  const std::vector<LayoutCase> cases = LayoutCases(results);
  if (cases.empty()) return;
  page->Section("Planner's choice against the best measured",
                "Of points that differ in their layout alone, the one that is predicted to be fastest, and "
                "the one that was.");
  page->Paragraph(absl::StrCat("The ", ChoiceText(cases), "."));
  HtmlTable table{.caption = "Planner's choice against the best measured",
                  .columns = {{"case", Align::kText},
                              {"layouts measured"},
                              {"planner's choice", Align::kText},
                              {"predicted"},
                              {kMeasuredText},
                              {"best measured", Align::kText},
                              {kMeasuredText},
                              {"choice slower by"}},
                  .rows = {}};
  const auto step = [](const std::optional<StepFigures>& figures) {
    return figures.has_value() ? StepText(figures->step_seconds) : std::string(kNone);
  };
  for (const LayoutCase& layouts : cases) {
    table.rows.push_back({layouts.label, absl::StrCat(layouts.measured), LayoutText(*layouts.choice),
                          step(layouts.choice->predicted), step(layouts.choice->measured),
                          LayoutText(*layouts.best), step(layouts.best->measured),
                          PercentText(layouts.slower_by)});
  }
  page->Table(table);
}

void AddFailed(const StudyResults& results, HtmlPage* page) {
  if (NoneOf(results, HasFailed)) return;
  page->Section("Failed and refused points",
                "Refused is what makes no sense, or is predicted not to fit in memory.");
  HtmlTable table{.caption = "Points that failed or were refused, and why",
                  .columns = {{"point", Align::kText}, {"ranks"}, {"reason", Align::kText}},
                  .rows = {}};
  for (const PointResult& point : results.points) {
    if (HasFailed(point))
      table.rows.push_back({point.point.id, absl::StrCat(point.point.ranks), point.reason});
  }
  page->Table(table);
}

void AddPoints(const StudyResults& results, HtmlPage* page) {
  page->Section("All points", "How each was run or simulated, and the exchange plans that attention took.");
  HtmlTable table{.caption = "All points",
                  .columns = {{"point", Align::kText},
                              {"ranks"},
                              {"hosts"},
                              {"state", Align::kText},
                              {"devices", Align::kText},
                              {"layout", Align::kText},
                              {"tokens a step"},
                              {"repeats' spread"},
                              {"overrides", Align::kText},
                              {"plans", Align::kText}},
                  .rows = {}};
  for (const PointResult& point : results.points) {
    const auto& figures = point.measured.has_value() ? point.measured : point.predicted;
    table.rows.push_back({point.point.id, absl::StrCat(point.point.ranks), absl::StrCat(point.point.hosts),
                          StateAndReason(point), DevicesText(point),
                          point.layout.empty() ? kNone : point.layout,
                          point.tokens_per_step > 0 ? absl::StrCat(point.tokens_per_step) : kNone,
                          point.measured.has_value() ? PercentText(point.measured_spread) : kNone,
                          absl::StrJoin(point.point.overrides, ", "),
                          figures.has_value() ? absl::StrJoin(figures->plans, "; ") : kNone});
  }
  page->Table(table);
}

}  // namespace annulus
