// A model as text of the configuration.

#include <charconv>

#include "absl/strings/str_join.h"
#include "annulus/train/hugging_face.h"

namespace annulus {
namespace {

// The shortest digits that read back as the same double.
std::string Number(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof(text), value).ptr;
  return std::string(text, end);
}

constexpr char kMlp[] = "-";

// What layers take where the pattern says nothing.
struct Thetas {
  std::optional<double> attention, latent;
};

std::optional<double> FirstTheta(const ModelSpec& spec, BranchKind kind) {
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      if (branch.kind == kind) return branch.rope_theta;
    }
  }
  return std::nullopt;
}

Thetas ThetasOf(const ModelSpec& spec) {
  return {.attention = FirstTheta(spec, BranchKind::kAttention),
          .latent = FirstTheta(spec, BranchKind::kLatentAttention)};
}

std::string Theta(std::optional<double> theta) { return theta.has_value() ? Number(*theta) : "none"; }

// Attributes of a unit hold for all its branches that have them: A and T side by side agree on theirs.
std::string UnitText(const LayerSpec& layer, const Thetas& thetas) {
  std::vector<std::string> letters, attributes;
  const auto add = [&](const std::string& attribute) {
    for (const std::string& known : attributes) {
      if (known == attribute) return;
    }
    attributes.push_back(attribute);
  };
  for (const BranchSpec& branch : layer.branches) {
    letters.emplace_back(1, static_cast<char>(branch.kind));
    const bool attention = branch.kind == BranchKind::kAttention;
    const bool latent = branch.kind == BranchKind::kLatentAttention;
    if (branch.window > 0) add(absl::StrCat("w=", branch.window));
    if ((attention && branch.rope_theta != thetas.attention) ||
        (latent && branch.rope_theta != thetas.latent)) {
      add(absl::StrCat("rope=", Theta(branch.rope_theta)));
    }
    if (branch.kv_layers_back > 0) add(absl::StrCat("kv=@-", branch.kv_layers_back));
    if (branch.latent_groups > 1) add(absl::StrCat("g=", branch.latent_groups));
    if (!branch.tie.empty()) add(absl::StrCat("tie=", branch.tie));
  }
  if (layer.combine == Combine::kMeanNorm) add("combine=mean-norm");
  const std::string text = absl::StrJoin(letters, "+");
  return attributes.empty() ? text : absl::StrCat(text, "{", absl::StrJoin(attributes, ","), "}");
}

// Units that stand several times in a row, from one place on.
struct Run {
  size_t period = 1, times = 1;
  size_t covered() const { return period * times; }
};
// The one that covers most, of those that cover as much the one of the shortest period.
Run LongestRun(absl::Span<const std::string> units) {
  Run longest;
  for (size_t period = 1; 2 * period <= units.size() && longest.covered() < units.size(); ++period) {
    size_t same = period;
    while (same < units.size() && units[same] == units[same - period]) ++same;
    const Run run{period, same / period};
    if (run.times > 1 && run.covered() > longest.covered()) longest = run;
    if (units[0] == kMlp) break;  // a block of several begins with what mixes tokens
  }
  return longest;
}

// "(M -)^3 T - A": repetitions as groups, those inside of groups too.
std::string Grouped(absl::Span<const std::string> units) {
  std::vector<std::string> items;
  for (size_t at = 0; at < units.size();) {
    const Run run = LongestRun(units.subspan(at));
    std::string item = run.period == 1 ? units[at] : Grouped(units.subspan(at, run.period));
    if (run.period > 1) item = absl::StrCat("(", item, ")");
    items.push_back(run.times == 1 ? item : absl::StrCat(item, "^", run.times));
    at += run.covered();
  }
  return absl::StrJoin(items, " ");
}

std::string Position(std::optional<double> theta) {
  return theta.has_value() ? absl::StrCat("rope_theta: ", Number(*theta)) : "rope: NONE";
}

std::string LinearText(absl::string_view name, const LinearSpec& linear, bool conv) {
  return absl::StrCat("  ", name, " { heads: ", linear.heads, " key_dim: ", linear.key_dim,
                      " value_dim: ", linear.value_dim, " chunk: ", linear.chunk,
                      conv ? absl::StrCat(" conv: ", linear.conv) : "", " }\n");
}

std::string RopeScalingText(const RopeScaling& s) {
  if (s.kind == RopeScalingKind::kNone) return "";
  const std::string head = absl::StrCat("factor: ", Number(s.factor),
                                        " original_length: ", static_cast<int64_t>(s.original_length));
  if (s.kind == RopeScalingKind::kLlama3) {
    return absl::StrCat("  rope_scaling { llama3 { ", head, " low_freq_factor: ", Number(s.low_freq_factor),
                        " high_freq_factor: ", Number(s.high_freq_factor), " } }\n");
  }
  return absl::StrCat("  rope_scaling { yarn { ", head, " beta_fast: ", Number(s.beta_fast),
                      " beta_slow: ", Number(s.beta_slow), " mscale: ", Number(s.mscale),
                      " mscale_all_dim: ", Number(s.mscale_all_dim), " } }\n");
}

}  // namespace

std::string PatternText(const ModelSpec& spec) {
  const Thetas thetas = ThetasOf(spec);
  std::vector<std::string> units;
  for (const LayerSpec& layer : spec.layers) units.push_back(UnitText(layer, thetas));
  return absl::StrCat(spec.meta_tokens > 0 ? absl::StrCat("meta=", spec.meta_tokens, " ") : "",
                      Grouped(units));
}

std::string ModelText(const ModelSpec& spec) {
  const Thetas thetas = ThetasOf(spec);
  std::string text = absl::StrCat("model {\n  pattern: \"", PatternText(spec),
                                  "\"\n  d_model: ", spec.d_model, "\n  vocab_size: ", spec.vocab_size, "\n");
  const auto add = [&](BranchKind kind, const std::string& section) {
    if (Uses(spec, kind)) absl::StrAppend(&text, section);
  };
  add(BranchKind::kAttention,
      absl::StrCat("  attention { heads: ", spec.heads, " kv_heads: ", spec.kv_heads,
                   " head_dim: ", spec.head_dim, " ", Position(thetas.attention),
                   spec.rotary_dim > 0 ? absl::StrCat(" rotary_dim: ", spec.rotary_dim) : "", " }\n"));
  const LatentSpec& latent = spec.latent;
  add(BranchKind::kLatentAttention,
      absl::StrCat("  latent { heads: ", latent.heads, " q_rank: ", latent.q_rank, " kv_rank: ",
                   latent.kv_rank, " nope_dim: ", latent.nope_dim, " rope_dim: ", latent.rope_dim,
                   " v_dim: ", latent.v_dim, " ", Position(thetas.latent), " }\n"));
  const MambaSpec& mamba = spec.mamba;
  add(BranchKind::kMamba,
      absl::StrCat("  mamba { heads: ", mamba.heads, " head_dim: ", mamba.head_dim, " state: ", mamba.state,
                   " groups: ", mamba.groups, " conv: ", mamba.conv, " chunk: ", mamba.chunk,
                   " dt_min: ", Number(mamba.dt_min), " dt_max: ", Number(mamba.dt_max), " }\n"));
  add(BranchKind::kLightning, LinearText("lightning", spec.lightning, false));
  add(BranchKind::kBased, LinearText("based", spec.based, false));
  add(BranchKind::kDeltaNet, LinearText("delta", spec.delta, true));
  const char* activation = spec.activation == Activation::kSwiglu ? "SWIGLU" : "RELU_SQUARED";
  add(BranchKind::kMlp, absl::StrCat("  mlp { d_ff: ", spec.d_ff, " activation: ", activation, " }\n"));
  return absl::StrCat(text, RopeScalingText(spec.rope_scaling), "  norm_eps: ", Number(spec.norm_eps),
                      "\n  init_stddev: ", Number(spec.init_stddev),
                      "\n  tied_head: ", spec.tied_head ? "true" : "false", "\n}\n");
}

std::string ModelOverride(const ModelSpec& spec) {
  std::string text = ModelText(spec);
  text.erase(0, text.find('{'));
  text.erase(text.rfind('}') + 1);
  return "model=" + text;
}

}  // namespace annulus
