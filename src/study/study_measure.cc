#include "study_measure.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/base/check.h"
#include "annulus/base/file.h"
#include "annulus/base/median.h"

namespace annulus {
namespace {

using Json = nlohmann::json;

// The lines of the steps that count.
absl::StatusOr<std::vector<Json>> ReadSteps(const std::string& path, int64_t warm_up, int64_t steps) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<Json> lines;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    Json json = Json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("step_ms") || !json["step_ms"].is_number()) {
      return Invalid(path, ": line ", lines.size() + 1, ": expected an object with step_ms");
    }
    lines.push_back(std::move(json));
  }
  if (static_cast<int64_t>(lines.size()) != warm_up + steps) {
    return Invalid(path, ": ", lines.size(), " steps, expected ", warm_up + steps);
  }
  lines.erase(lines.begin(), lines.begin() + static_cast<std::ptrdiff_t>(warm_up));
  return lines;
}

// Of a number that steps may leave away where it is zero.
double MedianOf(const std::vector<Json>& steps, const char* name) {
  std::vector<double> values;
  for (const Json& step : steps) {
    const Json value = step.value(name, Json(0.0));
    values.push_back(value.is_number() ? value.get<double>() : 0.0);
  }
  return Median(std::move(values));
}

int64_t Bytes(const Json& counts, const char* name) {
  const Json value = counts.is_object() ? counts.value(name, Json(0)) : Json(0);
  return value.is_number() ? value.get<int64_t>() : 0;
}

std::vector<std::string> PlansOf(const Json& step) {
  std::vector<std::string> plans;
  const Json attention = step.value("attention", Json::array());
  for (const Json& entry : attention.is_array() ? attention : Json::array()) {
    const auto text = [&](const char* name) {
      const Json value = entry.is_object() ? entry.value(name, Json("")) : Json("");
      return value.is_string() ? value.get<std::string>() : "";
    };
    plans.push_back(absl::StrCat(text("pass"), ": ", text("plan"), " by ", text("transport")));
  }
  return plans;
}

}  // namespace

std::string DevicesOf(const std::string& env) {
  const Json json = Json::parse(env, nullptr, /*allow_exceptions=*/false);
  const Json devices = json.is_object() ? json.value("devices", Json::object()) : Json::object();
  std::vector<std::string> texts;
  for (const auto& [name, ranks] : devices.items()) {
    if (ranks.is_number_integer()) texts.push_back(absl::StrCat(ranks.get<int64_t>(), " x ", name));
  }
  return absl::StrJoin(texts, ", ");
}

absl::StatusOr<Measurement> MeasurementOfRun(const std::string& run_dir, int64_t warm_up, int64_t steps) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<Json> lines,
                           ReadSteps(run_dir + "/metrics.jsonl", warm_up, steps));
  Measurement measurement{.figures = {}, .devices = DevicesOf(ReadFile(run_dir + "/env.json").value_or(""))};
  StepFigures& figures = measurement.figures;
  figures.step_seconds = MedianOf(lines, "step_ms") * 1e-3;
  figures.exposed_exchange_seconds = MedianOf(lines, "exposed_exchange_ms") * 1e-3;
  figures.exposed_gradients_seconds = MedianOf(lines, "exposed_reduce_ms") * 1e-3;
  figures.exposed_tensor_seconds = MedianOf(lines, "exposed_tensor_ms") * 1e-3;
  figures.bubble_seconds = MedianOf(lines, "data_ms") * 1e-3;
  // Each wait is that of the rank that waited longest: together they may be more than a step.
  figures.compute_seconds = std::max(0.0, figures.step_seconds - figures.exposed_exchange_seconds -
                                              figures.exposed_gradients_seconds -
                                              figures.exposed_tensor_seconds - figures.bubble_seconds);
  figures.tokens_per_second = MedianOf(lines, "tokens_per_second");
  figures.tflops_causal = MedianOf(lines, "tflops_causal");
  figures.tflops_full = MedianOf(lines, "tflops_full");
  figures.mfu_causal = MedianOf(lines, "mfu_causal");
  figures.mfu_full = MedianOf(lines, "mfu_full");
  const Json memory = lines.back().value("memory_bytes", Json::object());
  figures.memory = {.parameters = Bytes(memory, "parameters"),
                    .gradients = Bytes(memory, "gradients"),
                    .optimizer = Bytes(memory, "optimizer"),
                    .activations = Bytes(memory, "activations"),
                    .workspace = Bytes(memory, "workspace"),
                    .exchange = Bytes(memory, "exchange")};
  figures.other_memory_bytes = Bytes(memory, "other");
  const Json sent = lines.back().value("sent_bytes", Json::object());
  figures.bytes_inside_hosts = Bytes(sent, "inside_hosts");
  figures.bytes_between_hosts = Bytes(sent, "between_hosts");
  figures.plans = PlansOf(lines.back());
  return measurement;
}

Measurement MedianRun(std::vector<Measurement> runs) {
  ANNULUS_CHECK(!runs.empty());
  std::set<std::string> devices;
  for (const Measurement& run : runs) {
    if (!run.devices.empty()) devices.insert(run.devices);
  }
  const auto seconds = [](const Measurement& run) { return run.figures.step_seconds; };
  std::sort(runs.begin(), runs.end(),
            [&](const Measurement& a, const Measurement& b) { return seconds(a) < seconds(b); });
  Measurement& median = runs[(runs.size() - 1) / 2];
  if (seconds(median) > 0) median.spread = (seconds(runs.back()) - seconds(runs.front())) / seconds(median);
  median.devices = absl::StrJoin(devices, " or ");
  return std::move(median);
}

}  // namespace annulus
