// The page of a study: what was measured where, then figures from throughput to errors of predictions, then
// every point.

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "annulus/study/report.h"
#include "annulus/train/report.h"
#include "report_study_charts.h"
#include "report_study_tables.h"
#include "report_text.h"

namespace annulus {
namespace {

using Panels = std::vector<SeriesPanel>;

double TokensPerSecond(const StepFigures& figures) { return figures.tokens_per_second; }

double RatePerRank(const PointResult& point, const StepFigures& figures) {
  return figures.tokens_per_second / static_cast<double>(std::max<int64_t>(1, point.point.ranks));
}

bool HasFigures(const PointResult& point) {
  return point.measured.has_value() || point.predicted.has_value();
}

// The point that a series is compared with: its first with figures; null if there is none.
const PointResult* BaseOf(const PointSeries& series) {
  const auto base = std::find_if(series.points.begin(), series.points.end(),
                                 [](const PointResult* point) { return HasFigures(*point); });
  return base == series.points.end() ? nullptr : *base;
}

// Of the same kind, if the first point has both.
double BaseRate(const PointSeries& series, Look look) {
  const PointResult* base = BaseOf(series);
  if (base == nullptr) return kNotANumber;
  const bool measured =
      base->measured.has_value() && (look == Look::kMeasured || !base->predicted.has_value());
  return RatePerRank(*base, measured ? *base->measured : *base->predicted);
}

double IdealRate(const PointSeries& series, const PointResult& point, Look look) {
  return BaseRate(series, look) * static_cast<double>(point.point.ranks);
}

template <typename Fn>
bool AnyFigures(const StudyResults& results, Fn&& holds) {
  return std::any_of(results.points.begin(), results.points.end(), [&](const PointResult& point) {
    return (point.measured.has_value() && holds(*point.measured)) ||
           (point.predicted.has_value() && holds(*point.predicted));
  });
}

template <typename Fn>
int64_t Count(const StudyResults& results, Fn&& holds) {
  return std::count_if(results.points.begin(), results.points.end(), holds);
}

// In the order in which they come; none where no point has a profile.
std::vector<PointMachine> MachinesOf(const StudyResults& results) {
  std::vector<PointMachine> machines;
  for (const PointResult& point : results.points) {
    const auto same = [&](const PointMachine& machine) {
      return machine.device == point.machine.device && machine.measured == point.machine.measured;
    };
    if (!point.machine.device.empty() && std::none_of(machines.begin(), machines.end(), same))
      machines.push_back(point.machine);
  }
  return machines;
}

std::string LeadOf(const StudyResults& results) {
  const std::vector<PointMachine> machines = MachinesOf(results);
  std::vector<std::string> names;
  for (const PointMachine& machine : machines) {
    names.push_back(
        absl::StrCat(machine.device, " (", machine.measured ? "measured" : "assumed", " profile)"));
  }
  return absl::StrCat(results.scaling == Scaling::kStrong
                          ? "Strong scaling: all points of a line do the same work."
                          : "Weak scaling: the work grows with the ranks.",
                      names.size() > 1 ? " Machines: " : " Machine: ",
                      names.empty() ? "not named" : absl::StrJoin(names, "; "), ".");
}

// "4 x NVIDIA H200 (3 points); ...": what points were measured on, without their numbers where they are all
// on the same.
std::string MeasuredOnText(const StudyResults& results) {
  std::map<std::string, int64_t> points;
  for (const PointResult& point : results.points) {
    if (!point.measured.has_value()) continue;
    ++points[point.measured_on.empty() ? "devices that the runs do not name" : point.measured_on];
  }
  if (points.size() == 1) return points.begin()->first;
  return absl::StrJoin(points, "; ", [](std::string* text, const auto& on) {
    absl::StrAppend(text, on.first, " (", CountText(on.second, "point"), ")");
  });
}

void AddSummary(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  page->Section("Summary", "");
  const int64_t measured = Count(results, [](const auto& p) { return p.measured.has_value(); });
  const int64_t simulated =
      Count(results, [](const auto& p) { return p.predicted.has_value() && !p.measured.has_value(); });
  const auto in = [&](PointState state) {
    return absl::StrCat(Count(results, [state](const auto& p) { return p.state == state; }), " ",
                        Name(state));
  };
  std::vector<std::string> items = {
      absl::StrCat(CountText(static_cast<int64_t>(results.points.size()), "point"), ": ", measured,
                   " measured, ", simulated, " simulated only, ", in(PointState::kFailed), ", ",
                   in(PointState::kRefused), ", ", in(PointState::kOpen), ".")};
  if (measured > 0)
    items.push_back(absl::StrCat("Measured: medians over steps, on ", MeasuredOnText(results), "."));
  if (simulated > 0) items.push_back("Simulated: predicted step by step by the points' machine profiles.");
  for (const bool of_measured : {true, false}) {
    double best = 0;
    std::string text;
    ForEachPoint(panels, [&](const SeriesPanel& panel, const PointSeries& series, const PointResult& point) {
      const auto& figures = of_measured ? point.measured : point.predicted;
      if (!figures.has_value() || !(figures->tokens_per_second > best)) return;
      best = figures->tokens_per_second;
      text = absl::StrCat("Most tokens a second, ", of_measured ? kMeasuredText : kSimulatedText, ": ",
                          RateText(best), " with ", PointText(panel, series, point), ".");
    });
    if (!text.empty()) items.push_back(text);
  }
  page->List(items);
}

void AddThroughput(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  double low = INFINITY, high = 0;
  AnyFigures(results, [&](const StepFigures& figures) {
    if (figures.tokens_per_second > 0) low = std::min(low, figures.tokens_per_second);
    if (std::isfinite(figures.tokens_per_second)) high = std::max(high, figures.tokens_per_second);
    return false;
  });
  page->Section("Throughput", HaveOneRankCount(panels)
                                  ? "Tokens a second of all ranks."
                                  : "Tokens a second of all ranks. The ideal is the first point of a "
                                    "line times the ranks.");
  AddRankFigure(panels,
                {.title = "Throughput",
                 .unit = "tokens/s",
                 .scale = high > 5 * low ? Scale::kLog10 : Scale::kLinear,
                 .value = TokensPerSecond,
                 .text = RateText,
                 .tick = TickText,
                 .ideal = [](const PointSeries& series,
                             const PointResult& point) { return IdealRate(series, point, Look::kMeasured); }},
                page);
}

void AddUtilization(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  const bool peak =
      AnyFigures(results, [](const StepFigures& f) { return f.mfu_causal > 0 || f.mfu_full > 0; });
  if (!peak) {
    page->Section("Rate of computing",
                  "FLOP/s of a rank, attention counted causal; the machine's peak is not known.");
    AddRankFigure(panels,
                  {.title = "Rate of computing",
                   .unit = "TFLOP/s per rank",
                   .value = [](const StepFigures& f) { return f.tflops_causal; },
                   .text = NumberText,
                   .tick = TickText},
                  page);
    return;
  }
  page->Section("Model FLOPs utilization",
                "Of the machine's peak. Causal counts the keys that a token sees, full counts all of them; "
                "recomputation is not counted.");
  RankMetric metric{.title = "MFU, causal",
                    .unit = "of the peak",
                    .value = [](const StepFigures& f) { return f.mfu_causal; },
                    .text = PercentText,
                    .tick = PercentTick};
  AddRankFigure(panels, metric, page);
  metric.title = "MFU, full";
  metric.value = [](const StepFigures& f) { return f.mfu_full; };
  AddRankFigure(panels, metric, page);
}

void AddEfficiency(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  if (HaveOneRankCount(panels)) return;
  const char* title =
      results.scaling == Scaling::kStrong ? "Strong scaling efficiency" : "Weak scaling efficiency";
  page->Section(title, "Tokens a second of a rank, against those of a rank in the first point of the line.");
  AddRankFigure(panels,
                {.title = title,
                 .unit = "of ideal",
                 .value = TokensPerSecond,
                 .base = IdealRate,
                 .text = PercentText,
                 .tick = PercentTick,
                 .ideal = [](const PointSeries&, const PointResult&) { return 1.0; }},
                page);
}

std::vector<double> TimeParts(const StepFigures& f) {
  return {f.compute_seconds, f.exposed_exchange_seconds, f.exposed_gradients_seconds,
          f.exposed_tensor_seconds, f.bubble_seconds};
}

void AddBreakdown(const Panels& panels, HtmlPage* page) {
  page->Section(
      "Where the time of a step goes",
      "Means over ranks. Exposed is what computing does not hide; bubbles are waits for slower ranks, "
      "for data and for the host.");
  const std::vector<std::string> parts = {"compute", "exposed exchange", "exposed gradients",
                                          "exposed tensor", "bubbles"};
  std::vector<std::string> columns = {"step"};
  columns.insert(columns.end(), parts.begin(), parts.end());
  AddPartFigure(panels,
                {.title = "Time of a step",
                 .unit = "share of the step",
                 .parts = parts,
                 .values =
                     [](const StepFigures& f) {
                       std::vector<double> shares = TimeParts(f);
                       for (double& share : shares) share /= f.step_seconds;
                       return shares;
                     },
                 .tick = PercentTick,
                 .columns = columns,
                 .cells =
                     [](const StepFigures& f) {
                       std::vector<std::string> cells = {StepText(f.step_seconds)};
                       for (const double seconds : TimeParts(f)) {
                         cells.push_back(absl::StrCat(StepText(seconds), " (",
                                                      PercentText(seconds / f.step_seconds), ")"));
                       }
                       return cells;
                     },
                 .note = [](const StepFigures& f) { return StepText(f.step_seconds); }},
                page);
}

std::vector<double> MemoryParts(const StepFigures& f) {
  std::vector<double> bytes;
  for (const MemoryPlan::Part& part : f.memory.parts()) bytes.push_back(static_cast<double>(part.bytes));
  bytes.push_back(static_cast<double>(f.other_memory_bytes));
  return bytes;
}

double MemoryOf(const StepFigures& f) { return static_cast<double>(f.memory_bytes()); }

std::vector<double> ByteParts(const StepFigures& f) {
  return {static_cast<double>(f.bytes_inside_hosts), static_cast<double>(f.bytes_between_hosts)};
}

// Stacked bars of bytes, in the unit of the largest.
struct ByteMetric {
  std::string title;
  std::vector<std::string> parts;
  std::vector<double> (*bytes)(const StepFigures&);
  double limit = 0;  // 0: none
  std::vector<Look> looks = {Look::kMeasured, Look::kSimulated};
};

void AddBytes(const StudyResults& results, const Panels& panels, const ByteMetric& metric, HtmlPage* page) {
  const auto bytes = metric.bytes;
  const auto total = [bytes](const StepFigures& f) {
    double sum = 0;
    for (const double part : bytes(f)) sum += part;
    return sum;
  };
  double most = metric.limit;
  AnyFigures(results, [&](const StepFigures& f) { return most = std::max(most, total(f)), false; });
  const ByteUnit unit = ByteUnitFor(most);
  std::vector<std::string> columns = metric.parts;
  columns.push_back("total");
  PartMetric parts{.title = metric.title,
                   .unit = unit.name,
                   .parts = metric.parts,
                   .values =
                       [bytes, unit](const StepFigures& f) {
                         std::vector<double> values = bytes(f);
                         for (double& value : values) value /= unit.bytes;
                         return values;
                       },
                   .tick = TickText,
                   .columns = columns,
                   .cells =
                       [bytes, total](const StepFigures& f) {
                         std::vector<std::string> cells;
                         for (const double value : bytes(f)) cells.push_back(SizeText(value));
                         cells.push_back(SizeText(total(f)));
                         return cells;
                       },
                   .note = [total](const StepFigures& f) { return SizeText(total(f)); },
                   .limit = {},
                   .looks = metric.looks};
  if (metric.limit > 0)
    parts.limit = {metric.limit / unit.bytes, absl::StrCat("a rank has ", SizeText(metric.limit))};
  AddPartFigure(panels, parts, page);
}

// 0 where it is not known, or not the same for all points.
double MemoryOfRank(const StudyResults& results) {
  std::set<int64_t> bytes;
  for (const PointResult& point : results.points) {
    if (!point.machine.device.empty()) bytes.insert(point.machine.memory_bytes);
  }
  return bytes.size() == 1 ? static_cast<double>(*bytes.begin()) : 0;
}

void AddMemory(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  page->Section("Memory", "Of the rank that has most, by what it is for.");
  std::vector<std::string> parts;
  for (const MemoryPlan::Part& part : MemoryPlan().parts()) parts.push_back(part.name);
  parts.push_back("other");
  AddBytes(
      results, panels,
      {.title = "Memory of a rank", .parts = parts, .bytes = MemoryParts, .limit = MemoryOfRank(results)},
      page);
}

// Points that sent nothing, or did not count it, have none.
void AddTraffic(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  const auto sends = [](const std::optional<StepFigures>& figures) {
    return figures.has_value() && figures->bytes_inside_hosts + figures->bytes_between_hosts > 0;
  };
  std::vector<Look> looks;
  if (Count(results, [&](const auto& p) { return sends(p.measured); }) > 0) looks.push_back(Look::kMeasured);
  if (Count(results, [&](const auto& p) { return sends(p.predicted); }) > 0)
    looks.push_back(Look::kSimulated);
  if (looks.empty()) return;
  page->Section("Bytes sent", "In one step, of all ranks together.");
  AddBytes(results, panels,
           {.title = "Bytes sent in a step",
            .parts = {"inside hosts", "between hosts"},
            .bytes = ByteParts,
            .looks = looks},
           page);
}

void AddErrors(const StudyResults& results, const Panels& panels, HtmlPage* page) {
  if (Count(results, [](const auto& p) { return p.measured.has_value() && p.predicted.has_value(); }) == 0)
    return;
  page->Section("Predicted against measured", "Lines at 5% and 10% to either side.");
  AddErrorFigure(panels,
                 {.title = "Step time",
                  .x = {.title = "measured step, s", .scale = Scale::kLog10, .text = TickText},
                  .value = [](const StepFigures& f) { return f.step_seconds; },
                  .text = StepText},
                 page);
  AddErrorFigure(panels,
                 {.title = "Memory",
                  .x = {.title = "measured memory, GiB",
                        .scale = Scale::kLog10,
                        .text = [](double bytes) { return TickText(bytes); }},
                  .value = [](const StepFigures& f) { return MemoryOf(f) / (1 << 30); },
                  .text = [](double gib) { return SizeText(gib * (1 << 30)); }},
                 page);
}

}  // namespace

std::string StudyHtml(const StudyResults& results) {
  HtmlPage page(absl::StrCat("Scaling study: ", results.name), LeadOf(results));
  const Panels panels = PanelsOf(results);
  AddSummary(results, panels, &page);
  if (Count(results, HasFigures) > 0) {
    AddThroughput(results, panels, &page);
    AddUtilization(results, panels, &page);
    AddEfficiency(results, panels, &page);
    AddBreakdown(panels, &page);
    AddMemory(results, panels, &page);
    AddTraffic(results, panels, &page);
    AddErrors(results, panels, &page);
    AddChoices(results, &page);
    AddGoodput(results, panels, &page);
  }
  AddFailed(results, &page);
  AddPoints(results, &page);
  return page.Finish();
}

}  // namespace annulus
