#include "annulus/model/spec.h"

#include <cmath>

#include "absl/strings/str_join.h"
#include "annulus/base/nearest.h"
#include "layer_checks.h"

namespace annulus {
namespace {

constexpr int64_t kWidestConv = 8;  // taps that the kernels of short convolutions hold

// Collects "model.<field>=<value>: expected <what>" lines.
class Findings {
 public:
  template <typename T>
  void Require(bool ok, absl::string_view field, T value, absl::string_view expected) {
    if (!ok) lines_.push_back(absl::StrCat("model.", field, "=", value, ": expected ", expected));
  }
  void AtLeast(int64_t least, absl::string_view field, int64_t value) {
    Require(value >= least, field, value,
            absl::StrCat("at least ", least, " (nearest valid value ", least, ")"));
  }
  void AtLeastOne(absl::string_view field, int64_t value) { AtLeast(1, field, value); }
  void Even(absl::string_view field, int64_t value) {
    const bool even = value >= 2 && value % 2 == 0;
    const int64_t below = value - 1;
    Require(even, field, value,
            absl::StrCat("an even number of at least 2",
                         below < 2 ? NearestOf(2, 2) : NearestOf(below, below + 2)));
  }
  void Positive(absl::string_view field, double value) {
    Require(std::isfinite(value) && value > 0, field, value, "a finite number above 0");
  }
  void NotNegative(absl::string_view field, double value) {
    Require(std::isfinite(value) && value >= 0, field, value, "a finite number of at least 0");
  }
  void Multiple(absl::string_view field, int64_t value, absl::string_view unit_name, int64_t unit) {
    if (value < 1 || unit < 1) return;  // refused on their own
    Require(value % unit == 0, field, value,
            absl::StrCat("a multiple of ", unit_name, "=", unit, NearestMultiple(value, unit)));
  }
  absl::Status status() const {
    return lines_.empty() ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrJoin(lines_, "\n"));
  }

 private:
  std::vector<std::string> lines_;
};

void CheckAttention(const ModelSpec& spec, Findings* findings) {
  findings->AtLeastOne("attention.heads", spec.heads);
  findings->AtLeastOne("attention.kv_heads", spec.kv_heads);
  findings->Multiple("attention.heads", spec.heads, "model.attention.kv_heads", spec.kv_heads);
  findings->Even("attention.head_dim", spec.head_dim);
  findings->Require(spec.rotary_dim >= 0 && spec.rotary_dim <= spec.head_dim && spec.rotary_dim % 2 == 0,
                    "attention.rotary_dim", spec.rotary_dim,
                    absl::StrCat("an even number up to model.attention.head_dim=", spec.head_dim));
}

void CheckLatent(const ModelSpec& spec, Findings* findings) {
  const LatentSpec& latent = spec.latent;
  findings->AtLeastOne("latent.heads", latent.heads);
  findings->AtLeast(0, "latent.q_rank", latent.q_rank);
  findings->AtLeastOne("latent.kv_rank", latent.kv_rank);
  findings->AtLeastOne("latent.nope_dim", latent.nope_dim);
  findings->Even("latent.rope_dim", latent.rope_dim);
  findings->AtLeastOne("latent.v_dim", latent.v_dim);
  int64_t refused = 0;  // one line for all layers with the same g
  for (const LayerSpec& layer : spec.layers) {
    const BranchSpec* branch = FindBranch(layer, BranchKind::kLatentAttention);
    if (branch == nullptr || branch->latent_groups == refused) continue;
    if (branch->latent_groups < 1 || latent.kv_rank % branch->latent_groups == 0) continue;
    refused = branch->latent_groups;
    findings->Multiple("latent.kv_rank", latent.kv_rank, "g", branch->latent_groups);
  }
}

void CheckMamba(const MambaSpec& mamba, Findings* findings) {
  findings->AtLeastOne("mamba.heads", mamba.heads);
  findings->AtLeastOne("mamba.head_dim", mamba.head_dim);
  findings->AtLeastOne("mamba.state", mamba.state);
  findings->AtLeastOne("mamba.groups", mamba.groups);
  if (mamba.heads >= 1 && mamba.groups >= 1) {
    findings->Require(mamba.heads % mamba.groups == 0, "mamba.groups", mamba.groups,
                      absl::StrCat("a divisor of model.mamba.heads=", mamba.heads,
                                   NearestDivisor(mamba.groups, mamba.heads)));
  }
  findings->Require(
      mamba.conv >= 1 && mamba.conv <= kWidestConv, "mamba.conv", mamba.conv,
      absl::StrCat("1 to ", kWidestConv, " taps", NearestOf(0, mamba.conv < 1 ? 1 : kWidestConv)));
  findings->AtLeastOne("mamba.chunk", mamba.chunk);
  findings->NotNegative("mamba.dt_min", mamba.dt_min);
  findings->Require(mamba.dt_max == 0 || (std::isfinite(mamba.dt_max) && mamba.dt_max > mamba.dt_min),
                    "mamba.dt_max", mamba.dt_max,
                    absl::StrCat("0 (no limit) or a finite number above model.mamba.dt_min=", mamba.dt_min));
}

void CheckLinear(BranchKind kind, const LinearSpec& linear, Findings* findings) {
  const std::string name = Name(kind);
  findings->AtLeastOne(name + ".heads", linear.heads);
  findings->AtLeastOne(name + ".key_dim", linear.key_dim);
  findings->AtLeastOne(name + ".value_dim", linear.value_dim);
  findings->AtLeastOne(name + ".chunk", linear.chunk);
  if (kind != BranchKind::kDeltaNet) return;
  findings->Require(
      linear.conv >= 0 && linear.conv <= kWidestConv, name + ".conv", linear.conv,
      absl::StrCat("0 (none) to ", kWidestConv, " taps",
                   NearestOf(linear.conv < 0 ? 0 : kWidestConv, linear.conv < 0 ? 0 : kWidestConv)));
}

void CheckRopeScaling(const RopeScaling& scaling, Findings* findings) {
  if (scaling.kind == RopeScalingKind::kNone) return;
  const bool yarn = scaling.kind == RopeScalingKind::kYarn;
  const std::string name = yarn ? "rope_scaling.yarn." : "rope_scaling.llama3.";
  findings->Require(std::isfinite(scaling.factor) && scaling.factor >= 1, name + "factor", scaling.factor,
                    "a finite number of at least 1");
  findings->Require(std::isfinite(scaling.original_length) && scaling.original_length >= 1,
                    name + "original_length", scaling.original_length, "at least 1 token");
  if (yarn) {
    findings->Positive(name + "beta_slow", scaling.beta_slow);
    findings->Require(std::isfinite(scaling.beta_fast) && scaling.beta_fast > scaling.beta_slow,
                      name + "beta_fast", scaling.beta_fast,
                      absl::StrCat("a finite number above beta_slow=", scaling.beta_slow));
    findings->NotNegative(name + "mscale", scaling.mscale);
    findings->NotNegative(name + "mscale_all_dim", scaling.mscale_all_dim);
  } else {
    findings->Positive(name + "low_freq_factor", scaling.low_freq_factor);
    findings->Require(
        std::isfinite(scaling.high_freq_factor) && scaling.high_freq_factor > scaling.low_freq_factor,
        name + "high_freq_factor", scaling.high_freq_factor,
        absl::StrCat("a finite number above low_freq_factor=", scaling.low_freq_factor));
  }
}

// An attribute of a branch that has no such must be as it is by default.
void CheckBranch(const BranchSpec& branch, const std::string& name, Findings* findings) {
  const bool attention = branch.kind == BranchKind::kAttention;
  const bool latent = branch.kind == BranchKind::kLatentAttention;
  const std::string letter(1, static_cast<char>(branch.kind));
  findings->Require(std::string(Name(branch.kind)) != "unknown", name + ".kind", letter,
                    "one of A, T, M, L, B, G and -");
  findings->Require(attention || latent ? branch.window >= 0 : branch.window == 0, name + ".window",
                    branch.window, "at least 0, where 0 is all, and 0 on all but A and T");
  if (branch.rope_theta.has_value()) {
    const bool fits = (attention || latent) && std::isfinite(*branch.rope_theta) && *branch.rope_theta >= 1;
    findings->Require(fits, name + ".rope_theta", *branch.rope_theta,
                      "a finite number of at least 1, and none on all but A and T");
  }
  findings->Require(attention ? branch.kv_layers_back >= 0 : branch.kv_layers_back == 0,
                    name + ".kv_layers_back", branch.kv_layers_back, "at least 0, and 0 on all but A");
  findings->Require(latent ? branch.latent_groups >= 1 : branch.latent_groups == 1, name + ".latent_groups",
                    branch.latent_groups, "at least 1, and 1 on all but T");
}

void CheckLayer(const std::vector<LayerSpec>& layers, size_t index, Findings* findings) {
  const LayerSpec& layer = layers[index];
  const std::string name = absl::StrCat("layers[", index, "]");
  findings->Require(!layer.branches.empty(), name + ".branches", "[]", "at least one branch");
  for (size_t b = 0; b < layer.branches.size(); ++b) {
    const BranchSpec& branch = layer.branches[b];
    CheckBranch(branch, absl::StrCat(name, ".branches[", b, "]"), findings);
    findings->Require(FindBranch(layer, branch.kind) == &branch,
                      absl::StrCat(name, ".branches[", b, "].kind"), Name(branch.kind),
                      "each kind once in a layer");
  }
  findings->Require(layer.combine == Combine::kSum || layer.branches.size() > 1, name + ".combine",
                    "mean-norm", "sum with a single branch");
  for (const std::string& problem : {SharedKvProblem(layers, index), TieProblem(layers, index)}) {
    findings->Require(problem.empty(), name, "unfit", absl::StrCat("layers that fit together: ", problem));
  }
}

}  // namespace

const char* Name(BranchKind kind) {
  switch (kind) {
    case BranchKind::kAttention:
      return "attention";
    case BranchKind::kLatentAttention:
      return "latent";
    case BranchKind::kMamba:
      return "mamba";
    case BranchKind::kLightning:
      return "lightning";
    case BranchKind::kBased:
      return "based";
    case BranchKind::kDeltaNet:
      return "delta";
    case BranchKind::kMlp:
      return "mlp";
  }
  return "unknown";
}

bool MixesTokens(BranchKind kind) { return kind != BranchKind::kMlp; }

bool PassesStates(BranchKind kind) {
  return kind == BranchKind::kMamba || kind == BranchKind::kLightning || kind == BranchKind::kBased ||
         kind == BranchKind::kDeltaNet;
}

bool Uses(const ModelSpec& spec, BranchKind kind) {
  for (const LayerSpec& layer : spec.layers) {
    if (FindBranch(layer, kind) != nullptr) return true;
  }
  return false;
}

absl::Status Validate(const ModelSpec& spec) {
  Findings findings;
  findings.AtLeastOne("d_model", spec.d_model);
  findings.AtLeastOne("vocab_size", spec.vocab_size);
  if (Uses(spec, BranchKind::kMlp)) findings.AtLeastOne("mlp.d_ff", spec.d_ff);
  if (Uses(spec, BranchKind::kAttention)) CheckAttention(spec, &findings);
  if (Uses(spec, BranchKind::kLatentAttention)) CheckLatent(spec, &findings);
  if (Uses(spec, BranchKind::kMamba)) CheckMamba(spec.mamba, &findings);
  for (const auto& [kind, linear] : {std::pair(BranchKind::kLightning, &spec.lightning),
                                     {BranchKind::kBased, &spec.based},
                                     {BranchKind::kDeltaNet, &spec.delta}}) {
    if (Uses(spec, kind)) CheckLinear(kind, *linear, &findings);
  }
  CheckRopeScaling(spec.rope_scaling, &findings);
  findings.Positive("norm_eps", spec.norm_eps);
  findings.NotNegative("init_stddev", spec.init_stddev);
  findings.AtLeast(0, "meta_tokens", spec.meta_tokens);
  findings.Require(!spec.layers.empty(), "layers", "[]", "at least one layer");
  for (size_t i = 0; i < spec.layers.size(); ++i) CheckLayer(spec.layers, i, &findings);
  return findings.status();
}

}  // namespace annulus
