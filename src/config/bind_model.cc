#include "bind_model.h"

#include <algorithm>

namespace annulus::config {
namespace {

constexpr int64_t kByteVocabulary = 256;

// Sets an absent width from others: total / parts. What is 0 has been refused.
void DeriveQuotient(const Section& section, const std::string& name, int64_t total,
                    const std::string& total_name, int64_t parts, const std::string& parts_name,
                    int64_t* value) {
  if (parts == 0 || total == 0) return section.provenance()->NoFindingsOn(section.PathOf(name));
  if (total % parts != 0) {
    return section.provenance()->Missing(
        section.PathOf(name),
        absl::StrCat("it, since ", total_name, "=", total, " is no multiple of ", parts_name, "=", parts));
  }
  *value = total / parts;
  section.Derive(name, *value, absl::StrCat(total_name, " / ", parts_name));
}

// d_model / heads where `name` is left away.
void BindWidthOfHead(const Section& section, const std::string& name, int64_t d_model, int64_t heads,
                     int64_t* value) {
  if (section.Has(name)) return section.Int(name, Presence::kRequired, kHeadDimRange, value);
  DeriveQuotient(section, name, d_model, "model.d_model", heads, "heads", value);
}

// Sets an absent `name` to a value of the same section.
void BindOrCopy(const Section& section, const std::string& name, const IntRange& range, int64_t other,
                const std::string& other_name, int64_t* value) {
  if (section.Has(name)) return section.Int(name, Presence::kRequired, range, value);
  if (other == 0) return section.provenance()->NoFindingsOn(section.PathOf(name));
  *value = other;
  section.Derive(name, other, other_name);
}

void BindRope(const Section& section, std::optional<double>* theta) {
  if (section.Has("rope")) {
    bool rope = false;
    section.Enum<bool>("rope", {{"NONE", false}}, &rope);
    theta->reset();
  } else {
    section.Real("rope_theta", Presence::kOptional, kRopeThetaRange, &**theta);
  }
}

void BindAttention(const Section& attention, ModelSpec* model, PatternDefaults* defaults) {
  attention.Int("heads", Presence::kRequired, kHeadsRange, &model->heads);
  BindOrCopy(attention, "kv_heads", kHeadsRange, model->heads, "heads", &model->kv_heads);
  BindWidthOfHead(attention, "head_dim", model->d_model, model->heads, &model->head_dim);
  attention.Int("window", Presence::kOptional, kWindowRange, &defaults->window);
  BindRope(attention, &defaults->rope_theta);
  attention.Int("rotary_dim", Presence::kOptional, {0, kHeadDimRange.high}, &model->rotary_dim);
}

void BindLatent(const Section& section, LatentSpec* latent, PatternDefaults* defaults) {
  section.Int("heads", Presence::kRequired, kHeadsRange, &latent->heads);
  section.Int("q_rank", Presence::kOptional, {0, kWidthRange.high}, &latent->q_rank);
  section.Int("kv_rank", Presence::kRequired, kWidthRange, &latent->kv_rank);
  section.Int("nope_dim", Presence::kRequired, kHeadDimRange, &latent->nope_dim);
  section.Int("rope_dim", Presence::kRequired, kHeadDimRange, &latent->rope_dim);
  BindOrCopy(section, "v_dim", kHeadDimRange, latent->nope_dim, "nope_dim", &latent->v_dim);
  BindRope(section, &defaults->latent_rope_theta);
}

void BindMamba(const Section& section, int64_t d_model, MambaSpec* mamba) {
  section.Int("head_dim", Presence::kRequired, kHeadDimRange, &mamba->head_dim);
  if (section.Has("heads")) {
    section.Int("heads", Presence::kRequired, kHeadsRange, &mamba->heads);
  } else {
    DeriveQuotient(section, "heads", 2 * d_model, "2 * model.d_model", mamba->head_dim, "head_dim",
                   &mamba->heads);
  }
  section.Int("state", Presence::kRequired, kHeadDimRange, &mamba->state);
  section.Int("groups", Presence::kOptional, kHeadsRange, &mamba->groups);
  section.Int("conv", Presence::kOptional, {1, kTapsRange.high}, &mamba->conv);
  section.Int("chunk", Presence::kOptional, kChunkRange, &mamba->chunk);
  section.Real("dt_min", Presence::kOptional, kNotNegativeRange, &mamba->dt_min);
  section.Real("dt_max", Presence::kOptional, kNotNegativeRange, &mamba->dt_max);
}

void BindLinear(const Section& section, int64_t d_model, LinearSpec* linear) {
  section.Int("heads", Presence::kRequired, kHeadsRange, &linear->heads);
  BindWidthOfHead(section, "key_dim", d_model, linear->heads, &linear->key_dim);
  BindWidthOfHead(section, "value_dim", d_model, linear->heads, &linear->value_dim);
  section.Int("chunk", Presence::kOptional, kChunkRange, &linear->chunk);
}

void BindMlp(const Section& section, ModelSpec* model) {
  section.Int("d_ff", Presence::kRequired, kWidthRange, &model->d_ff);
  section.Enum<Activation>("activation",
                           {{"SWIGLU", Activation::kSwiglu}, {"RELU_SQUARED", Activation::kReluSquared}},
                           &model->activation);
}

void BindRopeScaling(const Section& section, RopeScaling* scaling) {
  const std::string kind = section.Chosen("kind");
  if (kind.empty()) {
    return section.provenance()->Missing(section.path(), "one of llama3 { ... }, yarn { ... }");
  }
  const Section of = section.Child(kind);
  int64_t length = 0;
  of.Real("factor", Presence::kRequired, kFactorRange, &scaling->factor);
  of.Int("original_length", Presence::kRequired, kLengthRange, &length);
  scaling->original_length = static_cast<double>(length);
  if (kind == "llama3") {
    scaling->kind = RopeScalingKind::kLlama3;
    of.Real("low_freq_factor", Presence::kOptional, kPositiveRange, &scaling->low_freq_factor);
    of.Real("high_freq_factor", Presence::kOptional, kPositiveRange, &scaling->high_freq_factor);
  } else {
    scaling->kind = RopeScalingKind::kYarn;
    of.Real("beta_fast", Presence::kOptional, kPositiveRange, &scaling->beta_fast);
    of.Real("beta_slow", Presence::kOptional, kPositiveRange, &scaling->beta_slow);
    of.Real("mscale", Presence::kOptional, kNotNegativeRange, &scaling->mscale);
    of.Real("mscale_all_dim", Presence::kOptional, kNotNegativeRange, &scaling->mscale_all_dim);
  }
}

// Sections of branches, where they are given.
void BindBranches(const Section& model, ModelSpec* out, PatternDefaults* defaults) {
  const auto with = [&](const char* name, auto&& bind) {
    if (model.Has(name)) bind(model.Child(name));
  };
  with("attention", [&](const Section& section) { BindAttention(section, out, defaults); });
  with("mlp", [&](const Section& section) { BindMlp(section, out); });
  with("latent", [&](const Section& section) { BindLatent(section, &out->latent, defaults); });
  with("mamba", [&](const Section& section) { BindMamba(section, out->d_model, &out->mamba); });
  with("lightning", [&](const Section& section) { BindLinear(section, out->d_model, &out->lightning); });
  with("based", [&](const Section& section) { BindLinear(section, out->d_model, &out->based); });
  with("delta", [&](const Section& section) {
    BindLinear(section, out->d_model, &out->delta);
    section.Int("conv", Presence::kOptional, kTapsRange, &out->delta.conv);
  });
}

void BindPattern(const Section& model, const PatternDefaults& defaults, RunSpec* spec) {
  model.String("pattern", Presence::kRequired, &spec->pattern);
  if (spec->pattern.empty()) return;
  auto pattern = ParsePattern(spec->pattern, defaults);
  if (!pattern.ok()) {
    return model.provenance()->Refuse(model.PathOf("pattern"),
                                      absl::StrCat("\"", Printable(spec->pattern), "\""),
                                      pattern.status().message());
  }
  spec->model.layers = std::move(pattern->layers);
  spec->model.meta_tokens = pattern->meta_tokens;
  for (const BranchKind kind :
       {BranchKind::kAttention, BranchKind::kMlp, BranchKind::kLatentAttention, BranchKind::kMamba,
        BranchKind::kLightning, BranchKind::kBased, BranchKind::kDeltaNet}) {
    if (Uses(spec->model, kind)) model.RequiredChild(Name(kind));
  }
}

// Text is bytes, so that a run on text alone needs no vocabulary.
bool AllText(const RunSpec& spec) {
  const auto is_text = [](const SourceSpec& source) { return source.format == SourceFormat::kText; };
  return !spec.data.train.empty() && std::all_of(spec.data.train.begin(), spec.data.train.end(), is_text) &&
         std::all_of(spec.data.validation.begin(), spec.data.validation.end(), is_text);
}

}  // namespace

void BindModel(const Section& model, RunSpec* spec) {
  ModelSpec* out = &spec->model;
  model.Int("d_model", Presence::kRequired, kWidthRange, &out->d_model);
  if (model.Has("vocab_size") || !AllText(*spec)) {
    model.Int("vocab_size", Presence::kRequired, kVocabularyRange, &out->vocab_size);
  } else {
    out->vocab_size = kByteVocabulary;
    model.Derive("vocab_size", kByteVocabulary, "text is read as bytes");
  }
  PatternDefaults defaults;
  BindBranches(model, out, &defaults);
  if (model.Has("rope_scaling")) BindRopeScaling(model.Child("rope_scaling"), &out->rope_scaling);
  model.Real("norm_eps", Presence::kOptional, kEpsilonRange, &out->norm_eps);
  model.Real("init_stddev", Presence::kOptional, kStddevRange, &out->init_stddev);
  model.Bool("tied_head", &out->tied_head);
  BindPattern(model, defaults, spec);
}

}  // namespace annulus::config
