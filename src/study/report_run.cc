// The page of a run: how it learned, how fast, with what memory, and what happened to it.

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "annulus/study/report.h"
#include "annulus/train/report.h"
#include "html_page.h"
#include "report_csv.h"
#include "report_run_charts.h"
#include "report_run_data.h"
#include "report_text.h"

namespace annulus {
namespace {

using Align = HtmlTable::Align;
using Swatch = LegendEntry::Swatch;

std::string LossText(double nats) { return absl::StrFormat("%.4f", nats); }
std::string MillisecondsText(double ms) { return StepText(ms / 1e3); }

std::vector<double> Finite(const RunRecord& run, RunNumber number) {
  std::vector<double> values;
  for (const RunStep& step : run.steps) {
    if (std::isfinite(step.Get(number))) values.push_back(step.Get(number));
  }
  return values;
}

// The upper one of two in the middle, which is a value of the run.
double UpperMedian(std::vector<double> values) {
  if (values.empty()) return kNotANumber;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double MedianOf(const RunRecord& run, RunNumber number) { return UpperMedian(Finite(run, number)); }

double MostOf(const RunRecord& run, RunNumber number) {
  const std::vector<double> values = Finite(run, number);
  return values.empty() ? kNotANumber : *std::max_element(values.begin(), values.end());
}

double SumOf(const RunRecord& run, RunNumber number) {
  double sum = 0;
  for (const double value : Finite(run, number)) sum += value;
  return sum;
}

std::string LeadOf(const RunRecord& run) {
  const std::string on = run.devices.empty() ? "." : absl::StrCat(", on ", run.devices, ".");
  if (!run.spec.has_value()) return "A training run" + on;
  const RunSpec& spec = *run.spec;
  return absl::StrCat("Model ", spec.pattern, ", sequences of ", spec.data.seq_len, " tokens, cp ",
                      spec.parallel.cp, ", tp ", spec.parallel.tp, on);
}

void AddSummary(const RunRecord& run, HtmlPage* page) {
  page->Section("Summary", "");
  HtmlTable table{.caption = "The run in numbers",
                  .columns = {{"what", Align::kText}, {"value", Align::kText}},
                  .rows = {}};
  const auto add = [&](const std::string& what, double value, std::string (*text)(double)) {
    if (std::isfinite(value)) table.rows.push_back({what, text(value)});
  };
  const std::string planned = run.spec.has_value() ? absl::StrCat(" of ", run.spec->optim.steps) : "";
  table.rows.push_back({"steps", absl::StrCat(run.steps.empty() ? 0 : run.steps.back().step, planned)});
  add("tokens", SumOf(run, kTokens), FormatCount);
  add("time of all steps", SumOf(run, kStepMs) / 1e3, FormatDuration);
  if (!run.steps.empty()) add("loss of the last step, nats a token", run.steps.back().Get(kLoss), LossText);
  const std::vector<double> validation = Finite(run, kValLoss);
  if (!validation.empty()) {
    add("validation loss, last", validation.back(), LossText);
    add("validation loss, best", *std::min_element(validation.begin(), validation.end()), LossText);
  }
  add("tokens a second, median", MedianOf(run, kTokensPerSecond), FormatCount);
  add("step, median", MedianOf(run, kStepMs), MillisecondsText);
  add("MFU causal, median", MedianOf(run, kMfuCausal), PercentText);
  add("MFU full, median", MedianOf(run, kMfuFull), PercentText);
  add("most memory of a rank", MostOf(run, kMemoryPeak), SizeText);
  if (!run.events.empty()) {
    const RunEvent& last = run.events.back();
    table.rows.push_back({"last event", absl::StrCat(last.event, " at step ", last.step, ", ", last.time)});
  }
  page->Table(table);
}

// Steps whose numbers are in no chart: skipped, or not finite.
void AddNotFinite(const RunRecord& run, HtmlPage* page) {
  HtmlTable table{.caption = "Steps that were skipped or whose loss or gradient is not finite",
                  .columns = {{"step"}, {"loss"}, {"gradient norm"}, {"parameters", Align::kText}},
                  .rows = {}};
  constexpr size_t kMost = 50;
  size_t count = 0;
  for (const RunStep& step : run.steps) {
    const bool skipped = step.Get(kSkipped) == 1;
    const bool finite = (!step.numbers[kLoss] || std::isfinite(step.Get(kLoss))) &&
                        (!step.numbers[kGradNorm] || std::isfinite(step.Get(kGradNorm)));
    if (finite && !skipped) continue;
    if (++count > kMost) continue;
    table.rows.push_back({absl::StrCat(step.step), NumberText(step.Get(kLoss)),
                          NumberText(step.Get(kGradNorm)), skipped ? "left as they were" : "updated"});
  }
  if (count == 0) return;
  page->Paragraph(absl::StrCat(CountText(static_cast<int64_t>(count), "step"), " skipped or not finite",
                               count > kMost ? "; the first of them:" : ":"));
  page->Table(table);
}

// The first steps of a long run fall so far that what follows would look flat: they are left to the chart
// over tokens.
RunChart LossOverSteps(const RunRecord& run, const std::vector<Curve>& curves) {
  RunChart chart{.title = "Loss against steps", .unit = "nats/token", .curves = curves};
  if (!IsLong(run)) return chart;
  const double from = std::floor(static_cast<double>(run.steps.back().step) / 50);
  for (Curve& curve : chart.curves) {
    curve.data.erase(std::remove_if(curve.data.begin(), curve.data.end(),
                                    [&](const ChartPoint& point) { return point.x < from; }),
                     curve.data.end());
  }
  absl::StrAppend(&chart.title, ", from step ", from, " on");
  return chart;
}

void AddLoss(const RunRecord& run, HtmlPage* page) {
  page->Section("Loss", "Nats a token.");
  constexpr size_t kMostPoints = 40;  // that can be told apart
  std::vector<Curve> curves = {RunCurve(run, kLoss, "training", 0)};
  std::vector<LegendEntry> legend = {{Swatch::kSeries, 0, "training"}};
  std::vector<RunColumn> columns = {{"training", kLoss, LossText, OfRange::kMeanLeastMost}};
  if (!Finite(run, kValLoss).empty()) {
    curves.push_back(RunCurve(run, kValLoss, "validation", 1));
    if (curves[1].data.size() <= kMostPoints) curves[1].draw = Draw::kLineAndPoints;
    legend.push_back({Swatch::kSeries, 1, "validation"});
    columns.push_back({"validation", kValLoss, LossText});
  }
  const RunChart tokens{.title = "Loss against tokens",
                        .unit = "nats/token",
                        .curves = curves,
                        .x = RunX::kTokens,
                        .scale = Scale::kLog10};
  page->Figure({PanelOf(run, LossOverSteps(run, curves)), PanelOf(run, tokens)}, legend,
               RunTable(run, "Loss, nats a token", columns));
  AddNotFinite(run, page);
}

void AddLearning(const RunRecord& run, HtmlPage* page) {
  page->Section("Gradient norm and learning rate", "The norm is that before clipping.");
  const bool wide = MostOf(run, kGradNorm) > 20 * MedianOf(run, kGradNorm);
  RunChart norm{.title = "Gradient norm",
                .unit = "norm",
                .curves = {RunCurve(run, kGradNorm, "", 0)},
                .scale = wide ? Scale::kLog10 : Scale::kLinear};
  RunChart rate{
      .title = "Learning rate", .unit = "learning rate", .curves = {RunCurve(run, kLearningRate, "", 2)}};
  page->Figure({PanelOf(run, norm), PanelOf(run, rate)}, {},
               RunTable(run, "Gradient norm and learning rate",
                        {{"gradient norm", kGradNorm, NumberText, OfRange::kMeanLeastMost},
                         {"learning rate", kLearningRate, NumberText}}));
}

void AddThroughput(const RunRecord& run, HtmlPage* page) {
  page->Section("Throughput", "Tokens a second of all ranks, and how much computing of the model that is.");
  const bool peak = !Finite(run, kMfuCausal).empty();
  RunChart tokens{.title = "Tokens a second",
                  .unit = "tokens/s",
                  .curves = {RunCurve(run, kTokensPerSecond, "", 0)},
                  .from = 0,
                  .tick = TickText};
  RunChart flops{.title = peak ? "Model FLOPs utilization" : "Rate of computing",
                 .unit = peak ? "of the peak" : "TFLOP/s per rank",
                 .curves = {RunCurve(run, peak ? kMfuCausal : kTflopsCausal, "causal", 0),
                            RunCurve(run, peak ? kMfuFull : kTflopsFull, "full", 1)},
                 .from = 0,
                 .tick = peak ? PercentTick : TickText};
  std::vector<RunColumn> columns = {{"tokens/s", kTokensPerSecond, RateText, OfRange::kMeanLeastMost},
                                    {"TFLOP/s per rank, causal", kTflopsCausal, NumberText},
                                    {"full", kTflopsFull, NumberText}};
  if (peak) {
    columns.push_back({"MFU causal", kMfuCausal, PercentText});
    columns.push_back({"MFU full", kMfuFull, PercentText});
  }
  page->Figure({PanelOf(run, tokens), PanelOf(run, flops)}, {}, RunTable(run, "Throughput", columns));
}

void AddStepTime(const RunRecord& run, HtmlPage* page) {
  page->Section(
      "Where the time of a step goes",
      "Each wait is that of the rank that waited longest; the rest is computing, and what it hides.");
  const std::vector<std::pair<RunNumber, std::string>> waits = {{kExchangeMs, "exposed exchange"},
                                                                {kReduceMs, "exposed gradients"},
                                                                {kTensorMs, "exposed tensor"},
                                                                {kDataMs, "data"}};
  std::vector<RunNumber> numbers;
  std::vector<RunColumn> columns = {{"step", kStepMs, MillisecondsText, OfRange::kMeanLeastMost}};
  std::vector<LegendEntry> legend = {{Swatch::kBar, 0, "rest"}};
  for (const auto& [number, name] : waits) {
    if (Finite(run, number).empty()) continue;
    numbers.push_back(number);
    columns.push_back({name, number, MillisecondsText});
    legend.push_back({Swatch::kBar, static_cast<int>(legend.size()), name});
  }
  RunChart chart{.title = "Time of a step",
                 .unit = "ms",
                 .curves = StackedCurves(run, kStepMs, numbers),
                 .from = 0,
                 .tick = TickText};
  page->Figure({PanelOf(run, chart)}, legend, RunTable(run, "Time of a step", columns));
}

void AddMemory(const RunRecord& run, HtmlPage* page) {
  page->Section("Memory", "Of the largest rank: on CPUs the most that was resident, on GPUs what is in use.");
  const ByteUnit unit = ByteUnitFor(MostOf(run, kMemoryPeak));
  Curve curve = RunCurve(run, kMemoryPeak, "", 0);
  for (ChartPoint& point : curve.data)
    point.y /= unit.bytes, point.low /= unit.bytes, point.high /= unit.bytes;
  RunChart chart{
      .title = "Memory of a rank", .unit = unit.name, .curves = {curve}, .from = 0, .tick = TickText};
  std::vector<RunColumn> columns = {{"in use", kMemoryPeak, SizeText}};
  BarChart parts{.title = "Memory of a rank by what it is for, last step",
                 .description = "One stacked bar; the table after the chart has the numbers.",
                 .x = {.title = unit.name, .text = TickText, .from = 0},
                 .parts = {},
                 .groups = {{.label = "last step", .bars = {{.parts = {}, .note = ""}}}}};
  std::vector<LegendEntry> legend;
  double sum = 0;
  for (const auto& [number, name] :
       std::vector<std::pair<RunNumber, std::string>>{{kMemoryParameters, "parameters"},
                                                      {kMemoryGradients, "gradients"},
                                                      {kMemoryOptimizer, "optimizer"},
                                                      {kMemoryActivations, "activations"},
                                                      {kMemoryWorkspace, "workspace"},
                                                      {kMemoryExchange, "exchange"},
                                                      {kMemoryOther, "other"}}) {
    const double bytes = run.steps.back().Get(number);
    if (!std::isfinite(bytes)) continue;
    sum += bytes;
    columns.push_back({name, number, SizeText});
    legend.push_back({Swatch::kBar, static_cast<int>(parts.parts.size()), name});
    parts.parts.push_back(name);
    parts.groups[0].bars[0].parts.push_back(bytes / unit.bytes);
  }
  parts.groups[0].bars[0].note = SizeText(sum);
  std::vector<HtmlPage::Panel> panels = {PanelOf(run, chart)};
  if (!parts.parts.empty()) panels.push_back({parts.title, Svg(parts)});
  page->Figure(panels, legend, RunTable(run, "Memory of a rank", columns));
}

double MedianY(const std::vector<ChartPoint>& points) {
  std::vector<double> values;
  // The first step makes plans and takes memory.
  for (size_t i = points.size() > 1 ? 1 : 0; i < points.size(); ++i) {
    if (std::isfinite(points[i].y)) values.push_back(points[i].y);
  }
  return UpperMedian(std::move(values));
}

void AddAttention(const RunRecord& run, HtmlPage* page) {
  if (run.attention.empty()) return;
  page->Section(
      "Attention: predicted against measured",
      "With its exchange, of one layer and micro-batch; measured is the mean of a step, of the slowest "
      "rank.");
  HtmlTable table{.caption = "Attention, medians without the first step",
                  .columns = {{"layers and pass", Align::kText},
                              {"plan", Align::kText},
                              {"predicted"},
                              {"measured"},
                              {"error of the prediction"}},
                  .rows = {}};
  std::vector<HtmlPage::Panel> panels;
  for (const AttentionTimes& times : run.attention) {
    const double measured = MedianY(times.measured), predicted = MedianY(times.predicted);
    const bool known = std::isfinite(predicted);
    table.rows.push_back({times.name, times.plan, known ? MillisecondsText(predicted) : kNone,
                          MillisecondsText(measured), known ? ErrorText(predicted / measured - 1) : kNone});
    RunChart chart{.title = times.name,
                   .unit = "ms",
                   .curves = {ThinnedCurve(times.measured, "measured", 0)},
                   .from = 0,
                   .tick = TickText};
    if (known) {
      chart.curves.push_back(ThinnedCurve(times.predicted, "predicted", 1));
      chart.curves.back().look = Look::kSimulated;
    }
    panels.push_back(PanelOf(run, chart));
  }
  page->Figure(panels, {}, table);
}

// Checkpoints that follow each other are one row.
void AddEvents(const RunRecord& run, HtmlPage* page) {
  if (run.events.empty()) return;
  page->Section("Events", "");
  HtmlTable table{
      .caption = "Events",
      .columns = {{"time", Align::kText}, {"event", Align::kText}, {"step"}, {"detail", Align::kText}},
      .rows = {}};
  for (size_t i = 0; i < run.events.size();) {
    const RunEvent& first = run.events[i];
    size_t end = i + 1;
    while (first.event == "checkpoint" && end < run.events.size() && run.events[end].event == "checkpoint")
      ++end;
    const RunEvent& last = run.events[end - 1];
    const bool several = end - i > 1;
    table.rows.push_back({several ? absl::StrCat(first.time, " to ", last.time) : first.time,
                          several ? absl::StrCat(end - i, " checkpoints") : first.event,
                          several ? absl::StrCat(first.step, " to ", last.step) : absl::StrCat(first.step),
                          first.detail});
    i = end;
  }
  page->Table(table);
}

}  // namespace

absl::StatusOr<std::string> RunHtml(const std::string& run_dir) {
  ANNULUS_ASSIGN_OR_RETURN(const RunRecord run, ReadRun(run_dir));
  HtmlPage page(absl::StrCat("Training run: ", run.name), LeadOf(run));
  AddSummary(run, &page);
  if (!run.steps.empty()) {
    page.Paragraph(ThinningText(run));
    AddLoss(run, &page);
    AddLearning(run, &page);
    AddThroughput(run, &page);
    AddStepTime(run, &page);
    AddMemory(run, &page);
    AddAttention(run, &page);
  }
  AddEvents(run, &page);
  if (!run.config.empty()) {
    page.Section("Configuration", "");
    if (!run.command.empty()) page.Folded("Command", run.command);
    if (!run.env.empty()) page.Folded("Environment", run.env);
    page.Folded("Resolved configuration", run.config);
  }
  return page.Finish();
}

absl::StatusOr<std::string> RunCsv(const std::string& run_dir) {
  ANNULUS_ASSIGN_OR_RETURN(const RunRecord run, ReadRun(run_dir));
  std::vector<std::string> header = {"step"};
  for (const RunNumberInfo& info : RunNumbers()) header.push_back(info.csv);
  std::string csv = CsvLine(header);
  for (const RunStep& step : run.steps) {
    std::vector<std::string> fields = {absl::StrCat(step.step)};
    for (const std::optional<double>& number : step.numbers)
      fields.push_back(number.has_value() ? CsvNumber(*number) : "");
    csv += CsvLine(fields);
  }
  return csv;
}

}  // namespace annulus
