#include "agreement.h"

#include "config_fields.h"

namespace annulus {
namespace {

using nlohmann::json;

// A field whose value follows from others.
struct Repeated {
  const char* name;
  json value;
  const char* source;  // in words of the class
  json absent = {};    // what the class takes where there is none; null: what follows
};

std::vector<Repeated> RepeatedIn(HfClass of, const ModelSpec& spec, const json& config) {
  const MambaSpec& mamba = spec.mamba;
  const LatentSpec& latent = spec.latent;
  const int64_t inner = mamba.heads * mamba.head_dim;
  switch (of) {
    case HfClass::kLlama:
      return {};
    case HfClass::kDeepseekV3:
      return {{"num_key_value_heads", latent.heads, "num_attention_heads"},
              {"qk_head_dim", latent.nope_dim + latent.rope_dim, "qk_nope_head_dim + qk_rope_head_dim"},
              {"head_dim", latent.rope_dim, "qk_rope_head_dim"}};
    case HfClass::kMamba2:
      return {{"expand", inner / spec.d_model, "num_heads * head_dim / hidden_size", 2}};
    case HfClass::kNemotronH:  // not `expand`, which it does not read; the rest in names of before
      return {{"num_hidden_layers", spec.layers.size(), "the layers listed"},
              {"hybrid_override_pattern", NemotronPattern(spec), "layers_block_type"},
              {"mamba_n_groups", mamba.groups, "n_groups"},
              {"mamba_d_conv", mamba.conv, "conv_kernel"},
              {"mamba_dt_min", mamba.dt_min, "time_step_min"},
              {"mamba_conv_bias", true, "use_conv_bias"}};
    case HfClass::kFalconH1: {
      // Given as null it follows from another field, which says nothing otherwise.
      const bool expands = config.contains("mamba_d_ssm") && config["mamba_d_ssm"].is_null();
      const double expand = static_cast<double>(inner) / static_cast<double>(spec.d_model);
      if (expands) return {{"mamba_expand", expand, "mamba_n_heads * mamba_d_head / hidden_size", 2}};
      return {{"mamba_d_ssm", inner, "mamba_n_heads * mamba_d_head", 1024}};
    }
    case HfClass::kAnnulus:
      return {{"num_hidden_layers", spec.layers.size(), "layers"}};
  }
  return {};
}

absl::Status CheckRepeated(const Repeated& field, const json& config) {
  json value = config.value(field.name, json());
  if (value.is_null()) value = field.absent;
  if (value.is_null() || value == field.value) return absl::OkStatus();
  return Unexpected(field.name, value, absl::StrCat(field.value.dump(), ", as ", field.source, " says"));
}

}  // namespace

absl::Status CheckAgreement(const HfConfig& read, const json& config) {
  const HfLayout& layout = LayoutOf(read.of);
  ANNULUS_RETURN_IF_ERROR(CheckRepeated({"model_type", layout.model_type, "architectures"}, config));
  for (const Repeated& field : RepeatedIn(read.of, read.spec, config)) {
    ANNULUS_RETURN_IF_ERROR(CheckRepeated(field, config));
  }
  return absl::OkStatus();
}

}  // namespace annulus
