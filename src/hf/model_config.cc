// Fields of config.json: tables for those that every class has under some name, code for what is special.

#include "model_config.h"

#include <cmath>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "agreement.h"
#include "checkpoint/strict_json.h"
#include "config_fields.h"
#include "rope_config.h"

namespace annulus {
namespace {

using nlohmann::json;

constexpr int kConfigDepth = 16;
constexpr char kInfinity[] = "Infinity";  // as Python writes it, without quotes
constexpr IntRange kBlocks{0, 100000};
constexpr int64_t kAbsentLength = 2048;  // classes without positions name no length

// Names of the same in layers_block_type: of today and of before.
struct BlockType {
  const char* name;
  char letter;
};
constexpr BlockType kBlockTypes[] = {
    {"linear_attention", 'M'}, {"mamba", 'M'}, {"full_attention", '*'}, {"attention", '*'}, {"mlp", '-'}};

bool HasTimeStepLimit(HfClass of) {
  return of == HfClass::kMamba2 || of == HfClass::kNemotronH || of == HfClass::kFalconH1 ||
         of == HfClass::kAnnulus;
}

// ---- export

json LayerJson(const LayerSpec& layer) {
  json branches = json::array();
  for (const BranchSpec& branch : layer.branches) {
    json to = {{"kind", Name(branch.kind)}};
    if (branch.kind == BranchKind::kAttention || branch.kind == BranchKind::kLatentAttention) {
      to["window"] = branch.window;
      to["rope_theta"] = branch.rope_theta.has_value() ? json(*branch.rope_theta) : json();
    }
    if (branch.kind == BranchKind::kLatentAttention) to["latent_groups"] = branch.latent_groups;
    branches.push_back(std::move(to));
  }
  return branches;
}

void WriteOwn(HfClass of, const ModelSpec& spec, json* to) {
  json& config = *to;
  const int64_t inner = spec.mamba.heads * spec.mamba.head_dim;
  switch (of) {
    case HfClass::kLlama:
      break;
    case HfClass::kDeepseekV3:
      config["num_key_value_heads"] = spec.latent.heads;
      config["first_k_dense_replace"] = spec.layers.size() / 2;  // no experts
      config["num_nextn_predict_layers"] = 0;
      config["rope_interleave"] = false;
      break;
    case HfClass::kMamba2:
      config["expand"] = inner / spec.d_model;
      break;
    case HfClass::kNemotronH:
      config["hybrid_override_pattern"] = NemotronPattern(spec);
      break;
    case HfClass::kFalconH1:
      config["mamba_d_ssm"] = inner;
      break;
    case HfClass::kAnnulus:
      config["hidden_act"] = spec.activation == Activation::kSwiglu ? "silu" : "relu2";
      config["layers"] = json::array();
      for (const LayerSpec& layer : spec.layers) config["layers"].push_back(LayerJson(layer));
      config["auto_map"] = {{"AutoConfig", "modeling_annulus.AnnulusConfig"},
                            {"AutoModelForCausalLM", "modeling_annulus.AnnulusForCausalLM"}};
      break;
  }
}

// ---- import

absl::Status ReadField(const HfField& field, const json& config, ModelSpec* spec) {
  json value = config.value(field.name, json());
  if (value.is_null()) {
    if (!field.absent) return Invalid("config.json: ", field.name, ": missing");
    value = field.absent(*spec);
  }
  if (const auto* ints = std::get_if<IntRange>(&field.range)) {
    ANNULUS_RETURN_IF_ERROR(ReadInt(field.name, value, *ints).status());
  } else if (const auto* reals = std::get_if<RealRange>(&field.range)) {
    ANNULUS_RETURN_IF_ERROR(ReadReal(field.name, value, *reals).status());
  } else if (!value.is_boolean()) {
    return Unexpected(field.name, value, "true or false");
  }
  field.set(value, spec);
  return absl::OkStatus();
}

absl::Status CheckFixed(HfClass of, const json& config) {
  for (const HfFixed& fixed : FixedOf(of)) {
    const json found = config.value(fixed.name, json());
    const json& value = found.is_null() ? fixed.absent : found;
    if (value != fixed.value) return Unexpected(fixed.name, value, fixed.value.dump());
  }
  return absl::OkStatus();
}

// A number of seconds that may be infinite: a string then, or {"__float__": "Infinity"}.
absl::StatusOr<double> TimeStep(json value) {
  if (value.is_object()) value = value.value("__float__", json());
  if (value == json(kInfinity)) return std::numeric_limits<double>::infinity();
  return ReadReal("time_step_limit", value, kNotNegativeRange);
}

absl::Status ReadTimeStepLimit(const json& config, MambaSpec* mamba) {
  const json limit = config.value("time_step_limit", json());
  if (limit.is_null()) return absl::OkStatus();
  if (!limit.is_array() || limit.size() != 2) return Unexpected("time_step_limit", limit, "two numbers");
  ANNULUS_ASSIGN_OR_RETURN(mamba->dt_min, TimeStep(limit[0]));
  ANNULUS_ASSIGN_OR_RETURN(const double most, TimeStep(limit[1]));
  mamba->dt_max = std::isinf(most) ? 0 : most;
  return absl::OkStatus();
}

// A branch says all that its kind has, and nothing else.
absl::Status ReadBranch(const json& from, BranchSpec* branch) {
  const bool latent = branch->kind == BranchKind::kLatentAttention;
  const bool attends = latent || branch->kind == BranchKind::kAttention;
  for (const auto& [key, value] : from.items()) {
    const bool known = key == "kind" || (attends && (key == "window" || key == "rope_theta")) ||
                       (latent && key == "latent_groups");
    if (known) continue;
    const char* more = latent    ? ", window, rope_theta or latent_groups"
                       : attends ? ", window or rope_theta"
                                 : "";
    return Unexpected(absl::StrCat("layers: ", key), value,
                      absl::StrCat("of ", Name(branch->kind), " no fields but kind", more));
  }
  if (!attends) return absl::OkStatus();
  if (!from.contains("rope_theta")) return Unexpected("layers", from, "a rope_theta, null for no positions");
  if (const json& theta = from["rope_theta"]; !theta.is_null()) {
    ANNULUS_ASSIGN_OR_RETURN(branch->rope_theta, ReadReal("layers: rope_theta", theta, kRopeThetaRange));
  }
  ANNULUS_ASSIGN_OR_RETURN(branch->window,
                           ReadInt("layers: window", from.value("window", json()), kWindowRange));
  if (!latent) return absl::OkStatus();
  ANNULUS_ASSIGN_OR_RETURN(branch->latent_groups, ReadInt("layers: latent_groups",
                                                          from.value("latent_groups", json()), kWidthRange));
  return absl::OkStatus();
}

absl::StatusOr<LayerSpec> ReadLayer(const json& branches) {
  if (!branches.is_array()) return Unexpected("layers", branches, "a list of branches each");
  LayerSpec layer;
  for (const json& from : branches) {
    const HfLayout::Layer& known = LayoutOf(HfClass::kAnnulus).block[0];
    BranchSpec branch;
    bool found = false;
    for (const HfLayout::Place& place : known.branches) {
      if (!from.is_object() || from.value("kind", json()) != json(Name(place.kind))) continue;
      branch.kind = place.kind, found = true;
    }
    if (!found) return Unexpected("layers", from, "a branch with its kind");
    ANNULUS_RETURN_IF_ERROR(ReadBranch(from, &branch));
    layer.branches.push_back(std::move(branch));
  }
  return layer;
}

absl::StatusOr<std::string> NemotronLetters(const json& config) {
  const json types = config.value("layers_block_type", config.value("layer_types", json()));
  if (types.is_null())
    return AsString(config.value("hybrid_override_pattern", json()), "config.json: hybrid_override_pattern");
  if (!types.is_array()) return Unexpected("layers_block_type", types, "a list");
  std::string letters;
  for (const json& type : types) {
    const size_t before = letters.size();
    for (const BlockType& known : kBlockTypes) {
      if (type == json(known.name)) letters += known.letter;
    }
    if (letters.size() == before) return Unexpected("layers_block_type", type, "mamba, attention or mlp");
  }
  return letters;
}

absl::StatusOr<std::vector<LayerSpec>> ReadLayers(HfClass of, const json& config,
                                                  std::optional<double> rope_theta) {
  std::vector<LayerSpec> layers;
  if (of == HfClass::kAnnulus) {
    const json given = config.value("layers", json());
    if (!given.is_array()) return Unexpected("layers", given, "a list");
    for (const json& branches : given) {
      ANNULUS_ASSIGN_OR_RETURN(layers.emplace_back(), ReadLayer(branches));
    }
    return layers;
  }
  if (of == HfClass::kNemotronH) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string letters, NemotronLetters(config));
    for (const char letter : letters) {
      const size_t before = layers.size();
      for (const auto& [kind, known] : kNemotronLetters) {
        if (letter == known) layers.push_back({.branches = {{.kind = kind}}});
      }
      if (layers.size() == before) {
        return Unexpected("hybrid_override_pattern", letters,
                          "layers M, * and - (experts are not supported)");
      }
    }
    return layers;
  }
  ANNULUS_ASSIGN_OR_RETURN(const int64_t blocks,
                           ReadInt("num_hidden_layers", config.value("num_hidden_layers", json()), kBlocks));
  for (int64_t i = 0; i < blocks; ++i) {
    for (const HfLayout::Layer& from : LayoutOf(of).block) {
      LayerSpec layer;
      for (const HfLayout::Place& place : from.branches) {
        const bool attends =
            place.kind == BranchKind::kAttention || place.kind == BranchKind::kLatentAttention;
        layer.branches.push_back(
            {.kind = place.kind, .rope_theta = attends ? rope_theta : std::optional<double>()});
      }
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

absl::Status ReadOwn(const json& config, HfConfig* to) {
  ModelSpec& spec = to->spec;
  const auto layers = static_cast<int64_t>(spec.layers.size());
  switch (to->of) {
    case HfClass::kNemotronH:
      spec.activation = Activation::kReluSquared;
      break;
    case HfClass::kDeepseekV3: {
      const json dense = config.value("first_k_dense_replace", json(3u));
      if (!dense.is_number_unsigned() || dense.get<int64_t>() < layers / 2) {
        return Unexpected(
            "first_k_dense_replace", dense,
            absl::StrCat("at least num_hidden_layers=", layers / 2, ": experts are not supported"));
      }
      const json interleave = config.value("rope_interleave", json(true));
      if (!interleave.is_boolean()) return Unexpected("rope_interleave", interleave, "true or false");
      to->pairs = interleave.get<bool>() ? RopePairs::kInterleaved : RopePairs::kHalves;
      break;
    }
    case HfClass::kAnnulus: {
      const json act = config.value("hidden_act", json());
      if (act != json("silu") && act != json("relu2")) return Unexpected("hidden_act", act, "silu or relu2");
      spec.activation = act == json("silu") ? Activation::kSwiglu : Activation::kReluSquared;
      break;
    }
    default:
      break;
  }
  return absl::OkStatus();
}

absl::StatusOr<HfClass> ClassOf(const json& config) {
  std::vector<std::string> known;
  const json given = config.value("architectures", json::array());
  for (const HfClass of : kHfClasses) {
    known.push_back(LayoutOf(of).architecture);
    if (given.is_array() && given.size() == 1 && given[0] == json(known.back())) return of;
  }
  return Unexpected("architectures", given, absl::StrCat("one of ", absl::StrJoin(known, ", ")));
}

}  // namespace

json HfConfigOf(HfClass of, const ModelSpec& spec, int64_t max_length) {
  const HfLayout& layout = LayoutOf(of);
  json config = {{"architectures", {layout.architecture}},
                 {"model_type", layout.model_type},
                 {"num_hidden_layers", spec.layers.size() / layout.block.size()},
                 {"bos_token_id", nullptr},
                 {"eos_token_id", nullptr},
                 {"pad_token_id", nullptr}};
  if (max_length > 0) config["max_position_embeddings"] = max_length;
  for (const HfField& field : FieldsOf(of)) config[field.name] = field.get(spec);
  for (const HfFixed& fixed : FixedOf(of)) config[fixed.name] = fixed.value;
  WriteRope(of, spec, &config);
  WriteOwn(of, spec, &config);
  if (HasTimeStepLimit(of)) {
    config["time_step_limit"] = {json(spec.mamba.dt_min),
                                 spec.mamba.dt_max > 0 ? json(spec.mamba.dt_max) : json(kInfinity)};
  }
  return config;
}

absl::StatusOr<HfConfig> ReadHfConfig(const json& config) {
  if (!config.is_object()) return Invalid("config.json: expected an object");
  HfConfig read;
  ANNULUS_ASSIGN_OR_RETURN(read.of, ClassOf(config));
  for (const HfField& field : FieldsOf(read.of)) {
    ANNULUS_RETURN_IF_ERROR(ReadField(field, config, &read.spec));
  }
  ANNULUS_RETURN_IF_ERROR(CheckFixed(read.of, config));
  if (const json quantized = config.value("quantization_config", json()); !quantized.is_null()) {
    return Unexpected("quantization_config", quantized, "none: weights are read as bf16, f32 or f64");
  }
  ANNULUS_ASSIGN_OR_RETURN(
      read.max_length, ReadInt("max_position_embeddings",
                               config.value("max_position_embeddings", json(kAbsentLength)), kLengthRange));
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<double> theta, ReadRope(read.of, config, &read.spec));
  if (HasTimeStepLimit(read.of) && read.of != HfClass::kNemotronH) {
    ANNULUS_RETURN_IF_ERROR(ReadTimeStepLimit(config, &read.spec.mamba));
  }
  ANNULUS_ASSIGN_OR_RETURN(read.spec.layers, ReadLayers(read.of, config, theta));
  ANNULUS_RETURN_IF_ERROR(ReadOwn(config, &read));
  if (read.spec.kv_heads > 0 && read.spec.heads % read.spec.kv_heads != 0) {
    return Unexpected("num_key_value_heads", read.spec.kv_heads,
                      absl::StrCat("a divisor of num_attention_heads=", read.spec.heads));
  }
  ANNULUS_RETURN_IF_ERROR(Prefixed(Validate(read.spec), "config.json: "));
  if (const std::string misfits = Misfits(read.of, read.spec); !misfits.empty()) return Invalid(misfits);
  ANNULUS_RETURN_IF_ERROR(CheckAgreement(read, config));
  return read;
}

std::string PythonJsonText(const json& value) {
  return absl::StrReplaceAll(value.dump(2, ' ', true, json::error_handler_t::replace),
                             {{absl::StrCat("\"", kInfinity, "\""), kInfinity}}) +
         "\n";
}

absl::StatusOr<json> ParsePythonJson(absl::string_view text) {
  std::string standard;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const absl::string_view rest = text.substr(i);
    if (!in_string && absl::StartsWith(rest, kInfinity)) {
      absl::StrAppend(&standard, "\"", kInfinity, "\"");
      i += sizeof(kInfinity) - 2;
      continue;
    }
    if (in_string && text[i] == '\\' && i + 1 < text.size())
      standard += text[i++];
    else if (text[i] == '"')
      in_string = !in_string;
    standard += text[i];
  }
  return ParseStrictJson(standard, kConfigDepth);
}

}  // namespace annulus
