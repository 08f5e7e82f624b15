#include "layer_checks.h"

#include <algorithm>

#include "absl/strings/str_join.h"

namespace annulus {
namespace {

std::string Letters(const std::vector<BranchSpec>& branches) {
  const auto letter = [](std::string* out, const BranchSpec& branch) {
    out->push_back(static_cast<char>(branch.kind));
  };
  return absl::StrJoin(branches, "+", letter);
}

std::string RopeOf(const BranchSpec& branch) {
  return branch.rope_theta.has_value() ? absl::StrCat("rope=", *branch.rope_theta) : "rope=none";
}

std::vector<BranchSpec> TiedBranches(const LayerSpec& layer, const std::string& name) {
  std::vector<BranchSpec> branches;
  for (const BranchSpec& branch : layer.branches) {
    if (branch.tie == name) branches.push_back(branch);
  }
  return branches;
}

}  // namespace

const BranchSpec* FindBranch(const LayerSpec& layer, BranchKind kind) {
  for (const BranchSpec& branch : layer.branches) {
    if (branch.kind == kind) return &branch;
  }
  return nullptr;
}

std::string SharedKvProblem(const std::vector<LayerSpec>& layers, size_t layer) {
  const BranchSpec* taker = FindBranch(layers[layer], BranchKind::kAttention);
  if (taker == nullptr || taker->kv_layers_back == 0) return "";
  if (taker->kv_layers_back > static_cast<int64_t>(layer)) {
    return absl::StrCat("kv=@-", taker->kv_layers_back, ": expected an earlier layer with A; ", layer,
                        " layers stand before layer ", layer);
  }
  const size_t owner_layer = layer - static_cast<size_t>(taker->kv_layers_back);
  const BranchSpec* owner = FindBranch(layers[owner_layer], BranchKind::kAttention);
  const std::string from = absl::StrCat("layer ", layer, " takes keys and values of layer ", owner_layer);
  if (owner == nullptr) {
    return absl::StrCat(from, ", which is ", Letters(layers[owner_layer].branches),
                        "; expected a layer with A");
  }
  if (owner->kv_layers_back > 0) {
    return absl::StrCat(from, ", which has none of its own; expected kv=@-",
                        taker->kv_layers_back + owner->kv_layers_back);
  }
  if (owner->rope_theta != taker->rope_theta) {
    return absl::StrCat(from, ", which has ", RopeOf(*owner), "; expected the same, got ", RopeOf(*taker));
  }
  return "";
}

std::string TieProblem(const std::vector<LayerSpec>& layers, size_t layer) {
  for (const BranchSpec& branch : layers[layer].branches) {
    if (branch.tie.empty()) continue;
    const std::vector<BranchSpec> here = TiedBranches(layers[layer], branch.tie);
    for (size_t first = 0; first < layer; ++first) {
      const std::vector<BranchSpec> there = TiedBranches(layers[first], branch.tie);
      if (there.empty()) continue;
      if (there == here) break;
      return absl::StrCat("layers ", first, " (", Letters(there), ") and ", layer, " (", Letters(here),
                          ") share the name ", branch.tie, "; expected the same branches and attributes");
    }
  }
  return "";
}

}  // namespace annulus
