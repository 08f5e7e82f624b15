#include "study_json.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace annulus {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kFormat = 1;

// Each struct names its fields once, for both ways: `visit(name, field)`.
template <typename T, typename Visit>
void VisitMemory(T& memory, const Visit& visit) {
  visit("parameters", memory.parameters);
  visit("gradients", memory.gradients);
  visit("optimizer", memory.optimizer);
  visit("activations", memory.activations);
  visit("workspace", memory.workspace);
  visit("exchange", memory.exchange);
}

template <typename T, typename Visit>
void VisitFigures(T& figures, const Visit& visit) {
  visit("step_seconds", figures.step_seconds);
  visit("compute_seconds", figures.compute_seconds);
  visit("exposed_exchange_seconds", figures.exposed_exchange_seconds);
  visit("exposed_gradients_seconds", figures.exposed_gradients_seconds);
  visit("exposed_tensor_seconds", figures.exposed_tensor_seconds);
  visit("bubble_seconds", figures.bubble_seconds);
  visit("tokens_per_second", figures.tokens_per_second);
  visit("tflops_causal", figures.tflops_causal);
  visit("tflops_full", figures.tflops_full);
  visit("mfu_causal", figures.mfu_causal);
  visit("mfu_full", figures.mfu_full);
  visit("other_memory_bytes", figures.other_memory_bytes);
  visit("bytes_inside_hosts", figures.bytes_inside_hosts);
  visit("bytes_between_hosts", figures.bytes_between_hosts);
  visit("plans", figures.plans);
}

template <typename T, typename Visit>
void VisitGoodput(T& goodput, const Visit& visit) {
  visit("share", goodput.share);
  visit("seconds", goodput.seconds);
  visit("failures", goodput.failures);
  visit("steps_between_saves", goodput.steps_between_saves);
  visit("saving_seconds", goodput.saving_seconds);
  visit("lost_seconds", goodput.lost_seconds);
  visit("restarting_seconds", goodput.restarting_seconds);
  visit("share_deviation", goodput.share_deviation);
  visit("best_steps_between_saves", goodput.best_steps_between_saves);
  visit("best_share", goodput.best_share);
}

// JSON has no numbers that are not finite: null stands for those.
struct Writer {
  Json* to;
  void operator()(const char* name, double value) const {
    (*to)[name] = std::isfinite(value) ? Json(value) : Json();
  }
  template <typename T>
  void operator()(const char* name, const T& value) const {
    (*to)[name] = value;
  }
};

// Throws what nlohmann throws where a field is missing or of another type; caught in ParseStoredPoint.
struct Reader {
  const Json* from;
  void operator()(const char* name, double& value) const {
    const Json& json = from->at(name);
    value = json.is_null() ? std::numeric_limits<double>::quiet_NaN() : json.get<double>();
  }
  template <typename T>
  void operator()(const char* name, T& value) const {
    value = from->at(name).get<T>();
  }
};

Json FiguresJson(const StepFigures& figures) {
  Json json, memory;
  VisitFigures(figures, Writer{&json});
  VisitMemory(figures.memory, Writer{&memory});
  json["memory"] = std::move(memory);
  if (!figures.documents.empty()) json["documents"] = figures.documents;
  return json;
}

StepFigures ReadFigures(const Json& json) {
  StepFigures figures;
  VisitFigures(figures, Reader{&json});
  VisitMemory(figures.memory, Reader{&json.at("memory")});
  figures.documents = json.value("documents", "");
  return figures;
}

Json PointJson(const StudyPoint& point) {
  Json labels = Json::array();
  for (const StudyPoint::Label& label : point.labels) labels.push_back({label.axis, label.value});
  return {{"id", point.id},
          {"labels", std::move(labels)},
          {"overrides", point.overrides},
          {"ranks", point.ranks},
          {"hosts", point.hosts}};
}

StudyPoint ReadPoint(const Json& json) {
  StudyPoint point;
  const Reader read{&json};
  read("id", point.id);
  read("overrides", point.overrides);
  read("ranks", point.ranks);
  read("hosts", point.hosts);
  for (const Json& label : json.at("labels")) {
    point.labels.push_back({label.at(0).get<std::string>(), label.at(1).get<std::string>()});
  }
  return point;
}

template <typename T, typename Visit>
void VisitStored(T& stored, const Visit& visit) {
  visit("measurement_key", stored.measurement_key);
  visit("measurement_error", stored.measurement_error);
  visit("prediction_key", stored.prediction_key);
  visit("prediction_error", stored.prediction_error);
  visit("reason", stored.result.reason);
  visit("tokens_per_step", stored.result.tokens_per_step);
  visit("layout", stored.result.layout);
  visit("measured_spread", stored.result.measured_spread);
}

// One that is not known is open, and so made anew.
PointState ReadState(const std::string& name) {
  for (const PointState state : {PointState::kDone, PointState::kFailed, PointState::kRefused}) {
    if (name == Name(state)) return state;
  }
  return PointState::kOpen;
}

StoredPoint ReadStored(const Json& json) {
  StoredPoint stored;
  PointResult& result = stored.result;
  result.point = ReadPoint(json.at("point"));
  VisitStored(stored, Reader{&json});
  result.state = ReadState(json.at("state").get<std::string>());
  if (json.contains("measured")) result.measured = ReadFigures(json["measured"]);
  result.measured_on = json.value("measured_on", "");
  if (json.contains("predicted")) result.predicted = ReadFigures(json["predicted"]);
  if (json.contains("goodput")) VisitGoodput(result.goodput.emplace(), Reader{&json["goodput"]});
  return stored;
}

}  // namespace

std::string StoredPointJson(const StoredPoint& stored) {
  const PointResult& result = stored.result;
  Json json = {{"format", kFormat}, {"point", PointJson(result.point)}};
  json["state"] = Name(result.state);
  VisitStored(stored, Writer{&json});
  if (result.measured) json["measured"] = FiguresJson(*result.measured);
  if (!result.measured_on.empty()) json["measured_on"] = result.measured_on;
  if (result.predicted) json["predicted"] = FiguresJson(*result.predicted);
  if (result.goodput) VisitGoodput(*result.goodput, Writer{&json["goodput"]});
  // Reasons come from logs, which may hold any bytes.
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

absl::StatusOr<StoredPoint> ParseStoredPoint(const std::string& text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.value("format", Json()) != kFormat) {
    return absl::DataLossError("expected the result of a point, an object of \"format\": 1");
  }
  try {
    return ReadStored(json);
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(error.what());
  }
}

}  // namespace annulus
