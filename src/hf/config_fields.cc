#include "config_fields.h"

#include <limits>

namespace annulus {
namespace {

using nlohmann::json;
using Fields = std::vector<HfField>;

// A field that is the member itself. `of`: a function from ModelSpec& to the member.
template <typename Of, typename Range>
HfField Member(const char* name, Of of, Range range, std::function<json(const ModelSpec&)> absent = {}) {
  using T = std::remove_reference_t<decltype(of(std::declval<ModelSpec&>()))>;
  return {.name = name,
          .get = [of](const ModelSpec& spec) { return json(of(const_cast<ModelSpec&>(spec))); },
          .set = [of](const json& value, ModelSpec* spec) { of(*spec) = value.template get<T>(); },
          .range = range,
          .absent = std::move(absent)};
}
constexpr std::monostate kBool;
#define ANNULUS_FIELD(member) [](ModelSpec& spec) -> auto& { return spec.member; }

auto Absent(json value) {
  return [value = std::move(value)](const ModelSpec&) { return value; };
}
json HeadsAsKvHeads(const ModelSpec& spec) { return spec.heads; }
json HeadDim(const ModelSpec& spec) { return spec.heads > 0 ? spec.d_model / spec.heads : 0; }

void Append(Fields more, Fields* to) { to->insert(to->end(), more.begin(), more.end()); }

// `eps`: the name of the norms' epsilon, and what it is where there is none.
Fields Common(const char* eps, double absent_eps) {
  return {Member("vocab_size", ANNULUS_FIELD(vocab_size), kVocabularyRange),
          Member("hidden_size", ANNULUS_FIELD(d_model), kWidthRange),
          Member(eps, ANNULUS_FIELD(norm_eps), kEpsilonRange, Absent(absent_eps)),
          Member("initializer_range", ANNULUS_FIELD(init_stddev), kStddevRange, Absent(0.02)),
          Member("tie_word_embeddings", ANNULUS_FIELD(tied_head), kBool, Absent(false))};
}
Fields Attention() {
  return {Member("num_attention_heads", ANNULUS_FIELD(heads), kHeadsRange),
          Member("num_key_value_heads", ANNULUS_FIELD(kv_heads), kHeadsRange, HeadsAsKvHeads),
          Member("head_dim", ANNULUS_FIELD(head_dim), kHeadDimRange, HeadDim)};
}
Fields Mlp() { return {Member("intermediate_size", ANNULUS_FIELD(d_ff), kWidthRange)}; }
Fields Latent(const char* heads) {
  return {Member(heads, ANNULUS_FIELD(latent.heads), kHeadsRange),
          Member("kv_lora_rank", ANNULUS_FIELD(latent.kv_rank), kWidthRange),
          Member("qk_nope_head_dim", ANNULUS_FIELD(latent.nope_dim), kHeadDimRange),
          Member("qk_rope_head_dim", ANNULUS_FIELD(latent.rope_dim), kHeadDimRange),
          Member("v_head_dim", ANNULUS_FIELD(latent.v_dim), kHeadDimRange),
          {.name = "q_lora_rank",
           .get = [](const ModelSpec& s) { return s.latent.q_rank > 0 ? json(s.latent.q_rank) : json(); },
           .set = [](const json& value, ModelSpec* s) { s->latent.q_rank = value.get<int64_t>(); },
           .range = IntRange{0, kWidthRange.high},
           .absent = Absent(0)}};
}

struct MambaNames {
  const char *heads, *head_dim, *state, *groups, *conv, *chunk;
};
Fields Mamba(const MambaNames& names) {
  return {Member(names.heads, ANNULUS_FIELD(mamba.heads), kHeadsRange),
          Member(names.head_dim, ANNULUS_FIELD(mamba.head_dim), kHeadDimRange),
          Member(names.state, ANNULUS_FIELD(mamba.state), kHeadDimRange),
          Member(names.groups, ANNULUS_FIELD(mamba.groups), kHeadsRange),
          Member(names.conv, ANNULUS_FIELD(mamba.conv), IntRange{1, kTapsRange.high}),
          Member(names.chunk, ANNULUS_FIELD(mamba.chunk), kChunkRange)};
}

Fields Together(std::vector<Fields> groups) {
  Fields all;
  for (Fields& group : groups) Append(std::move(group), &all);
  return all;
}

// Classes whose layers may lack a kind of branch: its sizes are 0 then.
Fields OrNone(Fields fields) {
  for (HfField& field : fields) {
    if (auto* range = std::get_if<IntRange>(&field.range)) range->low = 0;
  }
  return fields;
}

Fields MakeFields(HfClass of) {
  const MambaNames plain = {"num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size"};
  const MambaNames nemotron = {"mamba_num_heads", "mamba_head_dim", "ssm_state_size",
                               "n_groups",        "conv_kernel",    "chunk_size"};
  const MambaNames falcon = {"mamba_n_heads",  "mamba_d_head", "mamba_d_state",
                             "mamba_n_groups", "mamba_d_conv", "mamba_chunk_size"};
  switch (of) {
    case HfClass::kLlama:
      return Together({Common("rms_norm_eps", 1e-6), Attention(), Mlp()});
    case HfClass::kDeepseekV3:
      return Together({Common("rms_norm_eps", 1e-6), Latent("num_attention_heads"), Mlp()});
    case HfClass::kMamba2:
      return Together({Common("layer_norm_epsilon", 1e-5), Mamba(plain)});
    case HfClass::kNemotronH:
      // Its class clamps time steps by time_step_min, whatever time_step_limit says.
      return Together(
          {Common("layer_norm_epsilon", 1e-5),
           OrNone(Together({Attention(), Mlp(), Mamba(nemotron)})),
           {Member("time_step_min", ANNULUS_FIELD(mamba.dt_min), kNotNegativeRange, Absent(0.001))}});
    case HfClass::kFalconH1:
      return Together({Common("rms_norm_eps", 1e-5), Attention(), Mlp(), Mamba(falcon)});
    case HfClass::kAnnulus:
      break;
  }
  return Together(
      {Common("rms_norm_eps", 1e-5),
       {Member("rotary_dim", ANNULUS_FIELD(rotary_dim), IntRange{0, kHeadDimRange.high}, Absent(0))},
       OrNone(Together({Attention(), Latent("latent_attention_heads"), Mlp(), Mamba(falcon)}))});
}

std::vector<HfFixed> MakeFixed(HfClass of) {
  const json ones2 = {1.0, 1.0}, ones5 = {1.0, 1.0, 1.0, 1.0, 1.0};
  switch (of) {
    case HfClass::kLlama:
      return {{"hidden_act", "silu", "silu"}, {"attention_bias", false, false}, {"mlp_bias", false, false}};
    case HfClass::kDeepseekV3:
      return {{"hidden_act", "silu", "silu"}, {"attention_bias", false, false}};
    case HfClass::kMamba2:
      return {{"hidden_act", "silu", "silu"}, {"use_bias", false, false}, {"use_conv_bias", true, true}};
    case HfClass::kNemotronH:
      return {{"mlp_hidden_act", "relu2", "relu2"}, {"mamba_hidden_act", "silu", "silu"},
              {"use_bias", false, false},           {"use_conv_bias", true, true},
              {"mamba_proj_bias", false, false},    {"attention_bias", false, false},
              {"mlp_bias", false, false},           {"sliding_window", nullptr, nullptr}};
    case HfClass::kFalconH1:
      return {{"hidden_act", "silu", "silu"},
              {"attention_bias", false, false},
              {"mlp_bias", false, false},
              {"projectors_bias", false, false},
              {"mamba_conv_bias", true, true},
              {"mamba_proj_bias", false, false},
              {"mamba_rms_norm", true, false},
              {"mamba_norm_before_gate", false, true},
              {"embedding_multiplier", 1.0, 1.0},
              {"lm_head_multiplier", 1.0, 1.0},
              {"key_multiplier", 1.0, 1.0},
              {"attention_in_multiplier", 1.0, 1.0},
              {"attention_out_multiplier", 1.0, 1.0},
              {"ssm_in_multiplier", 1.0, 1.0},
              {"ssm_out_multiplier", 1.0, 1.0},
              {"ssm_multipliers", ones5, ones5},
              {"mlp_multipliers", ones2, ones2}};
    case HfClass::kAnnulus:
      break;
  }
  return {};
}

template <typename T>
const T& Cached(HfClass of, T (*make)(HfClass)) {
  static const std::vector<T> all = [make] {
    std::vector<T> tables;
    for (const HfClass each : kHfClasses) tables.push_back(make(each));
    return tables;
  }();
  return all[static_cast<size_t>(of)];
}

}  // namespace

const Fields& FieldsOf(HfClass of) { return Cached(of, MakeFields); }
const std::vector<HfFixed>& FixedOf(HfClass of) { return Cached(of, MakeFixed); }

std::string NemotronPattern(const ModelSpec& spec) {
  std::string letters;
  for (const LayerSpec& layer : spec.layers) {
    for (const NemotronLetter& known : kNemotronLetters) {
      if (layer.branches[0].kind == known.kind) letters += known.letter;
    }
  }
  return letters;
}

absl::Status Unexpected(absl::string_view field, const json& value, absl::string_view expected) {
  return Invalid("config.json: ", field, "=", value.dump(-1, ' ', true, json::error_handler_t::replace),
                 ": expected ", expected);
}

absl::StatusOr<int64_t> ReadInt(absl::string_view field, const json& value, const IntRange& range) {
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  const bool known =
      value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= kMost);
  if (known && range.Contains(value.get<int64_t>())) return value.get<int64_t>();
  return Unexpected(field, value, Describe(range));
}

absl::StatusOr<double> ReadReal(absl::string_view field, const json& value, const RealRange& range) {
  if (value.is_number() && range.Contains(value.get<double>())) return value.get<double>();
  return Unexpected(field, value, Describe(range));
}

}  // namespace annulus
