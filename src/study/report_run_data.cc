#include "report_run_data.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "annulus/base/file.h"
#include "annulus/train/config.h"
#include "study_measure.h"

namespace annulus {
namespace {

using Json = nlohmann::json;

// NaN and inf are written as strings.
std::optional<double> NumberOf(const Json& json) {
  if (json.is_boolean()) return json.get<bool>() ? 1 : 0;
  if (json.is_number()) return json.get<double>();
  if (!json.is_string()) return std::nullopt;
  const std::string text = json.get<std::string>();
  if (text == "nan") return kNotANumber;
  if (text == "inf") return INFINITY;
  if (text == "-inf") return -INFINITY;
  return std::nullopt;
}

std::string TextOf(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>() : "";
}

// Calls fn(json) with each line. One that a crash left half written at the end is left out.
absl::Status ReadLines(const std::string& path, const std::function<absl::Status(const Json&)>& fn) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  int64_t line = 1;
  for (size_t begin = 0; begin < text.size(); ++line) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const Json json = Json::parse(text.substr(begin, end - begin), nullptr, /*allow_exceptions=*/false);
    begin = end + 1;
    if (!json.is_object() && end == text.size()) break;
    if (!json.is_object()) return Invalid(path, ":", line, ": expected a JSON object");
    ANNULUS_RETURN_IF_ERROR(Prefixed(fn(json), absl::StrCat(path, ":", line, ": ")));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> StepOf(const Json& json) {
  const auto step = json.find("step");
  if (step == json.end() || !step->is_number_integer()) return Invalid("step: expected an integer");
  return step->get<int64_t>();
}

void AddAttention(const Json& entry, int64_t step, std::vector<AttentionTimes>* all) {
  if (!entry.is_object()) return;
  std::string name = TextOf(entry, "layer");
  if (const double window = NumberOf(entry.value("window", Json(0))).value_or(0); window > 0)
    absl::StrAppend(&name, ", window ", window);
  if (const double groups = NumberOf(entry.value("latent_groups", Json(0))).value_or(0); groups > 1)
    absl::StrAppend(&name, ", ", groups, " latent groups");
  absl::StrAppend(&name, ", ", TextOf(entry, "pass"));
  auto at = std::find_if(all->begin(), all->end(), [&](const AttentionTimes& a) { return a.name == name; });
  if (at == all->end())
    at = all->insert(all->end(), {.name = name, .plan = {}, .measured = {}, .predicted = {}});
  const std::string exchange = TextOf(entry, "exchange"), transport = TextOf(entry, "transport");
  at->plan = absl::StrCat(exchange, exchange.empty() ? "" : ", ", TextOf(entry, "plan"),
                          transport.empty() ? "" : " by ", transport);
  const double x = static_cast<double>(step);
  const auto milliseconds = [&](const char* key) {
    return NumberOf(entry.value(key, Json())).value_or(kNotANumber);
  };
  at->measured.push_back({.x = x, .y = milliseconds("measured_ms")});
  at->predicted.push_back({.x = x, .y = milliseconds("predicted_ms")});
}

// Steps that a resumed run did again replace those of before.
void DropFrom(int64_t step, RunRecord* run) {
  while (!run->steps.empty() && run->steps.back().step >= step) run->steps.pop_back();
  for (AttentionTimes& times : run->attention) {
    for (auto* points : {&times.measured, &times.predicted}) {
      while (!points->empty() && points->back().x >= static_cast<double>(step)) points->pop_back();
    }
  }
}

absl::Status AddStep(const Json& json, RunRecord* run) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t number, StepOf(json));
  DropFrom(number, run);
  RunStep step{.step = number};
  for (size_t i = 0; i < kRunNumbers; ++i) {
    const Json::json_pointer pointer(RunNumbers()[i].json);
    if (json.contains(pointer)) step.numbers[i] = NumberOf(json[pointer]);
  }
  run->steps.push_back(std::move(step));
  const auto attention = json.find("attention");
  if (attention == json.end() || !attention->is_array()) return absl::OkStatus();
  for (const Json& entry : *attention) AddAttention(entry, number, &run->attention);
  return absl::OkStatus();
}

absl::Status AddEvent(const Json& json, RunRecord* run) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t step, StepOf(json));
  run->events.push_back({.time = TextOf(json, "time"),
                         .event = TextOf(json, "event"),
                         .detail = TextOf(json, "detail"),
                         .step = step});
  return absl::OkStatus();
}

std::string TextIfThere(const std::string& path) { return ReadFile(path).value_or(""); }

}  // namespace

const std::array<RunNumberInfo, kRunNumbers>& RunNumbers() {
  static const std::array<RunNumberInfo, kRunNumbers> numbers = {{
      {"/loss", "loss_nats_per_token"},
      {"/grad_norm", "grad_norm"},
      {"/lr", "learning_rate"},
      {"/tokens", "tokens"},
      {"/step_ms", "step_ms"},
      {"/tokens_per_second", "tokens_per_second"},
      {"/tflops_causal", "tflops_causal_per_rank"},
      {"/tflops_full", "tflops_full_per_rank"},
      {"/mfu_causal", "mfu_causal"},
      {"/mfu_full", "mfu_full"},
      {"/exposed_exchange_ms", "exposed_exchange_ms"},
      {"/exposed_reduce_ms", "exposed_gradients_ms"},
      {"/exposed_tensor_ms", "exposed_tensor_ms"},
      {"/data_ms", "data_ms"},
      {"/state_bytes", "state_bytes"},
      {"/throttle_gb_per_second", "throttle_gb_per_second"},
      {"/memory_peak_bytes", "memory_peak_bytes"},
      {"/memory_bytes/parameters", "memory_parameters_bytes"},
      {"/memory_bytes/gradients", "memory_gradients_bytes"},
      {"/memory_bytes/optimizer", "memory_optimizer_bytes"},
      {"/memory_bytes/activations", "memory_activations_bytes"},
      {"/memory_bytes/workspace", "memory_workspace_bytes"},
      {"/memory_bytes/exchange", "memory_exchange_bytes"},
      {"/memory_bytes/other", "memory_other_bytes"},
      {"/skipped", "skipped"},
      {"/val_loss", "validation_loss_nats_per_token"},
      {"/val_accuracy", "validation_accuracy"},
  }};
  return numbers;
}

absl::StatusOr<RunRecord> ReadRun(const std::string& run_dir) {
  const std::string metrics = run_dir + "/metrics.jsonl", events = run_dir + "/events.jsonl";
  if (!Exists(metrics)) {
    return absl::NotFoundError(
        absl::StrCat(run_dir, ": expected the directory of a run, with its metrics.jsonl"));
  }
  RunRecord run;
  const std::filesystem::path path = std::filesystem::path(run_dir + "/").lexically_normal().parent_path();
  run.name = path.filename() == "." ? "run" : path.filename().string();
  ANNULUS_RETURN_IF_ERROR(ReadLines(metrics, [&](const Json& json) { return AddStep(json, &run); }));
  if (Exists(events)) {
    ANNULUS_RETURN_IF_ERROR(ReadLines(events, [&](const Json& json) { return AddEvent(json, &run); }));
  }
  run.config = TextIfThere(run_dir + "/config.resolved.textproto");
  run.command = TextIfThere(run_dir + "/command.txt");
  run.env = TextIfThere(run_dir + "/env.json");
  run.devices = DevicesOf(run.env);
  absl::StatusOr<ResolvedConfig> config = LoadConfig("config.resolved.textproto", run.config, {});
  if (config.ok()) run.spec = std::move(config->spec);
  return run;
}

}  // namespace annulus
