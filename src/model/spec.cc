#include "annulus/model/spec.h"

#include <cmath>

#include "absl/strings/str_join.h"

namespace annulus {
namespace {

// Collects "model.<field>=<value>: expected <what>" lines.
class Findings {
 public:
  template <typename T>
  void Require(bool ok, absl::string_view field, T value, absl::string_view expected) {
    if (!ok) lines_.push_back(absl::StrCat("model.", field, "=", value, ": expected ", expected));
  }
  absl::Status status() const {
    return lines_.empty() ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrJoin(lines_, "\n"));
  }

 private:
  std::vector<std::string> lines_;
};

void CheckHeads(const ModelSpec& spec, Findings* findings) {
  findings->Require(spec.heads >= 1, "attention.heads", spec.heads, "at least 1 (nearest valid value 1)");
  findings->Require(spec.kv_heads >= 1, "attention.kv_heads", spec.kv_heads,
                    "at least 1 (nearest valid value 1)");
  if (spec.heads >= 1 && spec.kv_heads >= 1 && spec.heads % spec.kv_heads != 0) {
    const int64_t below = spec.heads / spec.kv_heads * spec.kv_heads;
    const int64_t above = below + spec.kv_heads;
    const std::string nearest = below == 0 ? absl::StrCat(above) : absl::StrCat(below, " or ", above);
    findings->Require(false, "attention.heads", spec.heads,
                      absl::StrCat("a multiple of model.attention.kv_heads=", spec.kv_heads,
                                   " (nearest valid value ", nearest, ")"));
  }
  const bool even = spec.head_dim >= 2 && spec.head_dim % 2 == 0;
  if (!even) {
    const int64_t below = spec.head_dim - 1;
    const std::string nearest = below < 2 ? "2" : absl::StrCat(below, " or ", below + 2);
    findings->Require(false, "attention.head_dim", spec.head_dim,
                      absl::StrCat("an even number of at least 2 (nearest valid value ", nearest, ")"));
  }
}

void CheckBranch(const BranchSpec& branch, const std::string& name, Findings* findings) {
  findings->Require(branch.window >= 0, absl::StrCat(name, ".window"), branch.window,
                    "at least 0, where 0 is all");
  if (branch.rope_theta.has_value()) {
    findings->Require(std::isfinite(*branch.rope_theta) && *branch.rope_theta >= 1,
                      absl::StrCat(name, ".rope_theta"), *branch.rope_theta, "a finite number of at least 1");
  }
}

void CheckLayer(const LayerSpec& layer, size_t index, Findings* findings) {
  for (size_t b = 0; b < layer.branches.size(); ++b) {
    CheckBranch(layer.branches[b], absl::StrCat("layers[", index, "].branches[", b, "]"), findings);
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

absl::Status Validate(const ModelSpec& spec) {
  Findings findings;
  findings.Require(spec.d_model >= 1, "d_model", spec.d_model, "at least 1 (nearest valid value 1)");
  findings.Require(spec.vocab_size >= 1, "vocab_size", spec.vocab_size, "at least 1 (nearest valid value 1)");
  findings.Require(spec.d_ff >= 1, "mlp.d_ff", spec.d_ff, "at least 1 (nearest valid value 1)");
  CheckHeads(spec, &findings);
  findings.Require(std::isfinite(spec.norm_eps) && spec.norm_eps > 0, "norm_eps", spec.norm_eps,
                   "a finite number above 0");
  findings.Require(std::isfinite(spec.init_stddev) && spec.init_stddev >= 0, "init_stddev", spec.init_stddev,
                   "a finite number of at least 0");
  findings.Require(!spec.layers.empty(), "layers", "[]", "at least one layer");
  for (size_t i = 0; i < spec.layers.size(); ++i) CheckLayer(spec.layers[i], i, &findings);
  return findings.status();
}

}  // namespace annulus
