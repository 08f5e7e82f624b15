#include "report_csv.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "annulus/study/report.h"
#include "report_choice.h"

namespace annulus {
namespace {

struct FigureColumn {
  std::string name;
  std::string (*text)(const StepFigures&);
};

const std::vector<FigureColumn>& FigureColumns() {
  using F = StepFigures;
  static const std::vector<FigureColumn> columns = {
      {"step_seconds", [](const F& f) { return CsvNumber(f.step_seconds); }},
      {"compute_seconds", [](const F& f) { return CsvNumber(f.compute_seconds); }},
      {"exposed_exchange_seconds", [](const F& f) { return CsvNumber(f.exposed_exchange_seconds); }},
      {"exposed_gradients_seconds", [](const F& f) { return CsvNumber(f.exposed_gradients_seconds); }},
      {"exposed_tensor_seconds", [](const F& f) { return CsvNumber(f.exposed_tensor_seconds); }},
      {"bubble_seconds", [](const F& f) { return CsvNumber(f.bubble_seconds); }},
      {"tokens_per_second", [](const F& f) { return CsvNumber(f.tokens_per_second); }},
      {"tflops_causal_per_rank", [](const F& f) { return CsvNumber(f.tflops_causal); }},
      {"tflops_full_per_rank", [](const F& f) { return CsvNumber(f.tflops_full); }},
      {"mfu_causal", [](const F& f) { return CsvNumber(f.mfu_causal); }},
      {"mfu_full", [](const F& f) { return CsvNumber(f.mfu_full); }},
      {"memory_parameters_bytes", [](const F& f) { return absl::StrCat(f.memory.parameters); }},
      {"memory_gradients_bytes", [](const F& f) { return absl::StrCat(f.memory.gradients); }},
      {"memory_optimizer_bytes", [](const F& f) { return absl::StrCat(f.memory.optimizer); }},
      {"memory_activations_bytes", [](const F& f) { return absl::StrCat(f.memory.activations); }},
      {"memory_workspace_bytes", [](const F& f) { return absl::StrCat(f.memory.workspace); }},
      {"memory_exchange_bytes", [](const F& f) { return absl::StrCat(f.memory.exchange); }},
      {"memory_other_bytes", [](const F& f) { return absl::StrCat(f.other_memory_bytes); }},
      {"memory_total_bytes", [](const F& f) { return absl::StrCat(f.memory_bytes()); }},
      {"bytes_inside_hosts", [](const F& f) { return absl::StrCat(f.bytes_inside_hosts); }},
      {"bytes_between_hosts", [](const F& f) { return absl::StrCat(f.bytes_between_hosts); }},
      {"plans", [](const F& f) { return absl::StrJoin(f.plans, "; "); }}};
  return columns;
}

struct GoodputColumn {
  std::string name;
  std::string (*text)(const Goodput&);
};

const std::vector<GoodputColumn>& GoodputColumns() {
  using G = Goodput;
  static const std::vector<GoodputColumn> columns = {
      {"goodput_share", [](const G& g) { return CsvNumber(g.share); }},
      {"goodput_run_seconds", [](const G& g) { return CsvNumber(g.seconds); }},
      {"goodput_failures", [](const G& g) { return CsvNumber(g.failures); }},
      {"goodput_steps_between_saves", [](const G& g) { return absl::StrCat(g.steps_between_saves); }},
      {"goodput_saving_seconds", [](const G& g) { return CsvNumber(g.saving_seconds); }},
      {"goodput_lost_seconds", [](const G& g) { return CsvNumber(g.lost_seconds); }},
      {"goodput_restarting_seconds", [](const G& g) { return CsvNumber(g.restarting_seconds); }},
      {"goodput_share_deviation", [](const G& g) { return CsvNumber(g.share_deviation); }},
      {"goodput_best_steps_between_saves",
       [](const G& g) { return absl::StrCat(g.best_steps_between_saves); }},
      {"goodput_best_share", [](const G& g) { return CsvNumber(g.best_share); }}};
  return columns;
}

// The columns' values, or as many empty ones.
template <typename Columns, typename Value>
void Append(const Columns& columns, const std::optional<Value>& value, std::vector<std::string>* fields) {
  for (const auto& column : columns) fields->push_back(value.has_value() ? column.text(*value) : "");
}

std::vector<std::string> AxesOf(const StudyResults& results) {
  std::vector<std::string> axes;
  if (results.points.empty()) return axes;
  for (const StudyPoint::Label& label : results.points.front().point.labels) axes.push_back(label.axis);
  return axes;
}

std::vector<std::string> Header(const std::vector<std::string>& axes) {
  std::vector<std::string> names = {"study", "device", "profile", "scaling", "id"};
  for (const std::string& axis : axes) names.push_back("axis_" + axis);
  for (const char* name : {"overrides", "ranks", "hosts", "layout", "tokens_per_step", "state", "reason"})
    names.push_back(name);
  for (const char* kind : {"measured_", "predicted_"}) {
    for (const FigureColumn& column : FigureColumns()) names.push_back(kind + column.name);
  }
  names.push_back("measured_spread");
  names.push_back("measured_on");
  names.push_back("predicted_step_error");
  for (const GoodputColumn& column : GoodputColumns()) names.push_back(column.name);
  names.push_back("layout_choice");
  names.push_back("layout_slower_by");
  return names;
}

std::string AxisValue(const PointResult& point, const std::string& axis) {
  for (const StudyPoint::Label& label : point.point.labels) {
    if (label.axis == axis) return label.value;
  }
  return "";
}

// Whether it is the planner's choice of its case, the best measured or both; and how much slower the choice
// is.
void AppendChoice(const std::vector<LayoutCase>& cases, const PointResult& point,
                  std::vector<std::string>* fields) {
  std::string role, slower_by;
  for (const LayoutCase& layouts : cases) {
    if (&point == layouts.choice) role = "planner", slower_by = CsvNumber(layouts.slower_by);
    if (&point == layouts.best) absl::StrAppend(&role, role.empty() ? "" : " ", "best");
  }
  fields->push_back(role);
  fields->push_back(slower_by);
}

}  // namespace

std::string CsvLine(const std::vector<std::string>& fields) {
  std::string line;
  for (size_t i = 0; i < fields.size(); ++i) {
    const bool quote = fields[i].find_first_of(",\"\r\n") != std::string::npos;
    const std::string text =
        quote ? absl::StrCat("\"", absl::StrReplaceAll(fields[i], {{"\"", "\"\""}}), "\"") : fields[i];
    absl::StrAppend(&line, i == 0 ? "" : ",", text);
  }
  return line + "\r\n";
}

std::string CsvNumber(double value) { return absl::StrFormat("%.12g", value); }

std::string StudyCsv(const StudyResults& results) {
  const std::vector<std::string> axes = AxesOf(results);
  const std::vector<LayoutCase> cases = LayoutCases(results);
  std::string csv = CsvLine(Header(axes));
  for (const PointResult& point : results.points) {
    std::vector<std::string> fields = {
        results.name, point.machine.device, point.machine.measured ? "measured" : "assumed",
        results.scaling == Scaling::kStrong ? "strong" : "weak", point.point.id};
    for (const std::string& axis : axes) fields.push_back(AxisValue(point, axis));
    for (const std::string& text :
         {absl::StrJoin(point.point.overrides, " "), absl::StrCat(point.point.ranks),
          absl::StrCat(point.point.hosts), point.layout, absl::StrCat(point.tokens_per_step),
          std::string(Name(point.state)), point.reason}) {
      fields.push_back(text);
    }
    Append(FigureColumns(), point.measured, &fields);
    Append(FigureColumns(), point.predicted, &fields);
    const bool both = point.measured.has_value() && point.predicted.has_value();
    fields.push_back(point.measured.has_value() ? CsvNumber(point.measured_spread) : "");
    fields.push_back(point.measured_on);
    fields.push_back(both ? CsvNumber(point.predicted->step_seconds / point.measured->step_seconds - 1) : "");
    Append(GoodputColumns(), point.goodput, &fields);
    AppendChoice(cases, point, &fields);
    csv += CsvLine(fields);
  }
  return csv;
}

}  // namespace annulus
