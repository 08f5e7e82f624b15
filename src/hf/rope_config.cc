#include "rope_config.h"

#include "config_fields.h"

namespace annulus {
namespace {

using nlohmann::json;

constexpr double kLlamaTheta = 10000.0;  // of the class, in configurations older than the field

constexpr RealRange kPositionsRange{static_cast<double>(kLengthRange.low),
                                    static_cast<double>(kLengthRange.high)};

struct Number {
  const char* name;
  double RopeScaling::* of;
  RealRange range;
  std::optional<double> absent;
};
const std::vector<Number>& NumbersOf(RopeScalingKind kind) {
  static const std::vector<Number> llama3 = {
      {"factor", &RopeScaling::factor, kFactorRange, {}},
      {"original_max_position_embeddings", &RopeScaling::original_length, kPositionsRange, {}},
      {"low_freq_factor", &RopeScaling::low_freq_factor, kPositiveRange, {}},
      {"high_freq_factor", &RopeScaling::high_freq_factor, kPositiveRange, {}}};
  static const std::vector<Number> yarn = {
      {"factor", &RopeScaling::factor, kFactorRange, {}},
      {"original_max_position_embeddings", &RopeScaling::original_length, kPositionsRange, {}},
      {"beta_fast", &RopeScaling::beta_fast, kPositiveRange, 32},
      {"beta_slow", &RopeScaling::beta_slow, kPositiveRange, 1},
      {"mscale", &RopeScaling::mscale, kNotNegativeRange, 0},
      {"mscale_all_dim", &RopeScaling::mscale_all_dim, kNotNegativeRange, 0}};
  return kind == RopeScalingKind::kLlama3 ? llama3 : yarn;
}

json NumberJson(double value) {
  const auto whole = static_cast<int64_t>(value);
  return static_cast<double>(whole) == value ? json(whole) : json(value);
}

absl::Status ReadScaling(const json& from, RopeScaling* scaling) {
  const json type = from.value("rope_type", from.value("type", json("default")));
  if (const json older = from.value("type", type); older != type) {
    return Unexpected("type", older, absl::StrCat(type.dump(), ", as rope_type says"));
  }
  if (type == json("default")) return absl::OkStatus();
  if (type != json("llama3") && type != json("yarn")) {
    return Unexpected("rope_type", type, "default, llama3 or yarn");
  }
  scaling->kind = type == json("yarn") ? RopeScalingKind::kYarn : RopeScalingKind::kLlama3;
  for (const Number& number : NumbersOf(scaling->kind)) {
    json value = from.value(number.name, json());
    if (value.is_null() && number.absent.has_value()) value = *number.absent;
    ANNULUS_ASSIGN_OR_RETURN(scaling->*number.of, ReadReal(number.name, value, number.range));
  }
  if (scaling->kind == RopeScalingKind::kLlama3) return absl::OkStatus();
  if (const json factor = from.value("attention_factor", json()); !factor.is_null()) {
    return Unexpected("attention_factor", factor, "none: it follows from mscale and mscale_all_dim");
  }
  if (const json truncate = from.value("truncate", json(true)); truncate != json(true)) {
    return Unexpected("truncate", truncate, "true");
  }
  // With one of the two alone, Transformers scales rotations as if mscale were 1.
  if (scaling->mscale_all_dim == 0) scaling->mscale = 1;
  if (scaling->mscale == 0)
    return Unexpected("mscale", from.value("mscale", json()), "a number beside mscale_all_dim");
  return absl::OkStatus();
}

json ScalingJson(const RopeScaling& scaling) {
  if (scaling.kind == RopeScalingKind::kNone) return json();
  json to = {{"rope_type", scaling.kind == RopeScalingKind::kYarn ? "yarn" : "llama3"}};
  for (const Number& number : NumbersOf(scaling.kind)) to[number.name] = NumberJson(scaling.*number.of);
  return to;
}

bool HasOneTheta(HfClass of) {
  return of == HfClass::kLlama || of == HfClass::kDeepseekV3 || of == HfClass::kFalconH1;
}

std::optional<double> FirstTheta(const ModelSpec& spec) {
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      if (branch.rope_theta.has_value()) return branch.rope_theta;
    }
  }
  return std::nullopt;
}

// Names of other classes would mean nothing in ours.
absl::Status RefuseOthersRope(const json& config) {
  for (const char* name : {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}) {
    if (const json value = config.value(name, json()); !value.is_null()) {
      return Unexpected(name, value, "none: bases stand in layers, scaling in long_rope");
    }
  }
  return absl::OkStatus();
}

}  // namespace

void WriteRope(HfClass of, const ModelSpec& spec, json* config) {
  if (HasOneTheta(of)) (*config)["rope_theta"] = FirstTheta(spec).value();
  if (HasOneTheta(of)) (*config)["rope_scaling"] = ScalingJson(spec.rope_scaling);
  if (of == HfClass::kAnnulus) (*config)["long_rope"] = ScalingJson(spec.rope_scaling);
}

absl::StatusOr<std::optional<double>> ReadRope(HfClass of, const json& config, ModelSpec* spec) {
  if (!HasOneTheta(of) && of != HfClass::kAnnulus) return std::optional<double>();
  if (of == HfClass::kAnnulus) ANNULUS_RETURN_IF_ERROR(RefuseOthersRope(config));
  json parameters = config.value(HasOneTheta(of) ? "rope_parameters" : "long_rope", json());
  const json older = config.value("rope_scaling", json());
  if (parameters.is_null()) parameters = older;
  if (!older.is_null() && older != parameters) {
    return Unexpected("rope_scaling", older, "the same as rope_parameters, or none");
  }
  if (parameters.is_null()) parameters = json::object();
  if (!parameters.is_object()) return Unexpected("rope_parameters", parameters, "an object");
  ANNULUS_RETURN_IF_ERROR(ReadScaling(parameters, &spec->rope_scaling));
  if (!HasOneTheta(of)) return std::optional<double>();
  json theta = parameters.value("rope_theta", config.value("rope_theta", json()));
  if (const json outside = config.value("rope_theta", json()); !outside.is_null() && outside != theta) {
    return Unexpected("rope_theta", outside, absl::StrCat(theta.dump(), ", as rope_parameters says"));
  }
  if (theta.is_null() && of == HfClass::kLlama) theta = kLlamaTheta;
  ANNULUS_ASSIGN_OR_RETURN(const double base, ReadReal("rope_theta", theta, kRopeThetaRange));
  for (const json* from : std::initializer_list<const json*>{&parameters, &config}) {
    const json partial = from->value("partial_rotary_factor", json());
    if (!partial.is_null() && partial != json(1.0)) return Unexpected("partial_rotary_factor", partial, "1");
  }
  return std::optional<double>(base);
}

}  // namespace annulus
