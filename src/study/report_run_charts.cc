#include "report_run_charts.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "report_text.h"

namespace annulus {
namespace {

constexpr size_t kMostPoints = 300, kBuckets = 240, kTableRows = 24;
constexpr size_t kMostTicks = 40;  // of checkpoints

// The finite ones of [begin, end).
struct Spread {
  double mean = kNotANumber, low = kNotANumber, high = kNotANumber;
};

template <typename Value>
Spread SpreadOf(size_t begin, size_t end, Value&& value) {
  Spread spread;
  double sum = 0;
  int64_t count = 0;
  for (size_t i = begin; i < end; ++i) {
    const double v = value(i);
    if (!std::isfinite(v)) continue;
    spread.low = count == 0 ? v : std::min(spread.low, v);
    spread.high = count == 0 ? v : std::max(spread.high, v);
    sum += v;
    ++count;
  }
  if (count > 0) spread.mean = sum / static_cast<double>(count);
  return spread;
}

// Bounds of `buckets` even parts of `count` things.
std::vector<size_t> BoundsOf(size_t count, size_t buckets) {
  std::vector<size_t> bounds;
  for (size_t i = 0; i <= buckets; ++i) bounds.push_back(count * i / buckets);
  return bounds;
}

std::vector<ChartPoint> Thinned(const std::vector<ChartPoint>& points) {
  if (points.size() <= kMostPoints) return points;
  std::vector<ChartPoint> thinned;
  const std::vector<size_t> bounds = BoundsOf(points.size(), kBuckets);
  for (size_t i = 0; i < kBuckets; ++i) {
    const Spread x = SpreadOf(bounds[i], bounds[i + 1], [&](size_t j) { return points[j].x; });
    const Spread y = SpreadOf(bounds[i], bounds[i + 1], [&](size_t j) { return points[j].y; });
    thinned.push_back({.x = x.mean, .y = y.mean, .low = y.low, .high = y.high});
  }
  return thinned;
}

// Tokens of all steps up to this one, also between steps.
class TokenCount {
 public:
  explicit TokenCount(const RunRecord& run) {
    double sum = 0;
    for (const RunStep& step : run.steps) {
      const double tokens = step.Get(kTokens);
      sum += std::isfinite(tokens) ? tokens : 0;
      steps_.push_back(static_cast<double>(step.step));
      sums_.push_back(sum);
    }
  }
  double At(double step) const {
    const auto next = std::lower_bound(steps_.begin(), steps_.end(), step);
    if (next == steps_.end()) return sums_.empty() ? 0 : sums_.back();
    const size_t i = static_cast<size_t>(next - steps_.begin());
    if (i == 0) return steps_[0] > 0 ? sums_[0] * step / steps_[0] : 0;
    const double share = (step - steps_[i - 1]) / (steps_[i] - steps_[i - 1]);
    return sums_[i - 1] + share * (sums_[i] - sums_[i - 1]);
  }

 private:
  std::vector<double> steps_, sums_;
};

// Lines for what is rare, short marks for checkpoints while they can be told apart.
std::vector<ChartMark> MarksOf(const RunRecord& run) {
  std::vector<ChartMark> marks;
  const auto is_checkpoint = [](const RunEvent& event) { return event.event == "checkpoint"; };
  const auto checkpoints = std::count_if(run.events.begin(), run.events.end(), is_checkpoint);
  for (const RunEvent& event : run.events) {
    const double x = static_cast<double>(event.step);
    if (!is_checkpoint(event)) {
      const std::string label = event.event == "start" && event.step > 0 ? "resumed" : event.event;
      const bool beside = !marks.empty() && marks.back().x == x && !marks.back().label.empty();
      if (!beside) marks.push_back({.x = x, .label = label});
      if (beside) absl::StrAppend(&marks.back().label, ", ", label);
    } else if (static_cast<size_t>(checkpoints) <= kMostTicks) {
      marks.push_back({.x = x, .label = ""});
    }
  }
  return marks;
}

std::string RangeText(const RunRecord& run, size_t begin, size_t end) {
  const int64_t first = run.steps[begin].step, last = run.steps[end - 1].step;
  return first == last ? absl::StrCat(first) : absl::StrCat(first, "–", last);
}

// What is there but not finite says so.
std::string CellOf(const RunRecord& run, size_t begin, size_t end, const RunColumn& column) {
  const Spread spread = SpreadOf(begin, end, [&](size_t j) { return run.steps[j].Get(column.number); });
  if (!std::isfinite(spread.mean)) {
    const std::optional<double>& last = run.steps[end - 1].numbers[column.number];
    return last.has_value() ? column.text(*last) : kNone;
  }
  const std::string mean = column.text(spread.mean), low = column.text(spread.low),
                    high = column.text(spread.high);
  if (column.of_range == OfRange::kMean || low == high) return mean;
  return absl::StrCat(mean, " (", low, " to ", high, ")");
}

}  // namespace

Curve ThinnedCurve(const std::vector<ChartPoint>& points, const std::string& label, int color) {
  return {.label = label, .end_label = label, .color = color, .draw = Draw::kLine, .data = Thinned(points)};
}

Curve RunCurve(const RunRecord& run, RunNumber number, const std::string& label, int color) {
  std::vector<ChartPoint> points;
  for (const RunStep& step : run.steps) {
    if (step.numbers[number].has_value())
      points.push_back({.x = static_cast<double>(step.step), .y = *step.numbers[number]});
  }
  return ThinnedCurve(points, label, color);
}

std::vector<Curve> StackedCurves(const RunRecord& run, RunNumber whole, const std::vector<RunNumber>& parts) {
  std::vector<Curve> curves(parts.size() + 1);
  for (size_t i = 0; i < curves.size(); ++i) curves[i] = {.color = static_cast<int>(i), .look = Look::kArea};
  const std::vector<size_t> bounds = BoundsOf(run.steps.size(), std::min(run.steps.size(), kBuckets));
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const auto mean = [&](RunNumber number) {
      const auto value = [&](size_t j) { return run.steps[j].Get(number); };
      const double mean_value = SpreadOf(bounds[i], bounds[i + 1], value).mean;
      return std::isfinite(mean_value) ? mean_value : 0;
    };
    const double x = (static_cast<double>(run.steps[bounds[i]].step) +
                      static_cast<double>(run.steps[bounds[i + 1] - 1].step)) /
                     2;
    double rest = mean(whole);
    for (const RunNumber part : parts) rest -= mean(part);
    double sum = std::max(0.0, rest);  // waits of different ranks may add up to more than a step
    curves[0].data.push_back({.x = x, .y = kNotANumber, .low = 0, .high = sum});
    for (size_t p = 0; p < parts.size(); ++p) {
      const double part = mean(parts[p]);
      curves[p + 1].data.push_back({.x = x, .y = kNotANumber, .low = sum, .high = sum + part});
      sum += part;
    }
  }
  return curves;
}

bool IsLong(const RunRecord& run) { return run.steps.size() > kMostPoints; }

std::string ThinningText(const RunRecord& run) {
  if (!IsLong(run)) return "";
  return absl::StrCat("Lines are means of about ", run.steps.size() / kBuckets,
                      " steps each; bands reach from the least to the most of them.");
}

HtmlPage::Panel PanelOf(const RunRecord& run, const RunChart& chart) {
  const char* x_name = chart.x == RunX::kSteps ? "steps" : "tokens";
  LineChart lines{.title = chart.title,
                  .description = absl::StrCat(chart.title, " in ", chart.unit, " against ", x_name,
                                              "; the table after the chart has the numbers."),
                  .x = {.title = x_name, .text = TickText},
                  .y = {.title = chart.unit, .scale = chart.scale, .from = chart.from},
                  .curves = chart.curves,
                  .marks = MarksOf(run)};
  if (chart.tick != nullptr) lines.y.text = chart.tick;
  if (chart.x == RunX::kSteps) {
    lines.x.to = static_cast<double>(run.steps.back().step);
  } else {
    const TokenCount tokens(run);
    lines.x.scale = Scale::kLog10;
    for (ChartMark& mark : lines.marks) mark.x = tokens.At(mark.x);
    for (Curve& curve : lines.curves) {
      for (ChartPoint& point : curve.data) point.x = tokens.At(point.x);
    }
  }
  return {chart.title, Svg(lines)};
}

HtmlTable RunTable(const RunRecord& run, const std::string& caption, const std::vector<RunColumn>& columns) {
  const size_t rows = std::min(run.steps.size(), kTableRows);
  const bool means = rows < run.steps.size();
  HtmlTable table{.caption = absl::StrCat(caption, means ? "; of several steps their mean" : ""),
                  .columns = {{"steps"}},
                  .rows = {}};
  for (const RunColumn& column : columns) table.columns.push_back({column.name});
  const std::vector<size_t> bounds = BoundsOf(run.steps.size(), rows);
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    std::vector<std::string> row = {RangeText(run, bounds[i], bounds[i + 1])};
    for (const RunColumn& column : columns) row.push_back(CellOf(run, bounds[i], bounds[i + 1], column));
    table.rows.push_back(std::move(row));
  }
  return table;
}

}  // namespace annulus
