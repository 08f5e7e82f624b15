// Which of our models a class of Transformers can hold.

#include "absl/strings/str_join.h"
#include "model_config.h"

namespace annulus {
namespace {

std::string Letters(const LayerSpec& layer) {
  return absl::StrJoin(layer.branches, "+", [](std::string* out, const BranchSpec& branch) {
    out->push_back(static_cast<char>(branch.kind));
  });
}

std::string Letters(const HfLayout::Layer& layer) {
  const char* separator = layer.takes == HfLayout::Takes::kAll ? "+" : " or ";
  return absl::StrJoin(layer.branches, separator, [](std::string* out, const HfLayout::Place& place) {
    out->push_back(static_cast<char>(place.kind));
  });
}

bool Takes(const HfLayout::Layer& here, const LayerSpec& layer) {
  for (const BranchSpec& branch : layer.branches) {
    bool known = false;
    for (const HfLayout::Place& place : here.branches) known = known || place.kind == branch.kind;
    if (!known) return false;
  }
  switch (here.takes) {
    case HfLayout::Takes::kAll:
      return layer.branches.size() == here.branches.size();
    case HfLayout::Takes::kOne:
      return layer.branches.size() == 1;
    case HfLayout::Takes::kSome:
      return true;
  }
  return false;
}

class Finder {
 public:
  Finder(HfClass of, const ModelSpec& spec) : of_(of), spec_(spec), layout_(LayoutOf(of)) {}

  std::string Find() {
    for (size_t i = 0; i < spec_.layers.size() && lines_.empty(); ++i) CheckLayer(i);
    const size_t together = layout_.block.size();
    if (spec_.layers.size() % together != 0) {
      Add("its layers come in groups of ", together, ", and there are ", spec_.layers.size());
    }
    if (spec_.meta_tokens > 0) Add("it has no meta tokens");
    CheckWidths();
    return absl::StrJoin(lines_, "\n");
  }

 private:
  template <typename... Args>
  void Add(const Args&... args) {
    lines_.push_back(absl::StrCat(layout_.architecture, ": ", args...));
  }

  void CheckLayer(size_t i) {
    const LayerSpec& layer = spec_.layers[i];
    const HfLayout::Layer& here = layout_.block[i % layout_.block.size()];
    const std::string where = absl::StrCat("layer ", i, " is ", Letters(layer));
    if (!Takes(here, layer)) return Add(where, ": it has ", Letters(here), " there");
    if (layer.combine != Combine::kSum) return Add(where, " with combine=mean-norm: it only adds up");
    const bool general = of_ == HfClass::kAnnulus;
    for (const BranchSpec& branch : layer.branches) {
      if (branch.kv_layers_back > 0) Add(where, " with kv=@-", branch.kv_layers_back, ": it shares none");
      if (!branch.tie.empty()) Add(where, " with tie=", branch.tie, ": it ties no layers");
      if (branch.latent_groups > 1 && !general) Add(where, " with g=", branch.latent_groups, ": it has g=1");
      if (branch.window > 0 && !general) Add(where, " with w=", branch.window, ": it has no windows");
      CheckRope(where, branch);
    }
  }
  void CheckRope(const std::string& where, const BranchSpec& branch) {
    const bool attends = branch.kind == BranchKind::kAttention || branch.kind == BranchKind::kLatentAttention;
    if (!attends || of_ == HfClass::kAnnulus) return;
    if (of_ == HfClass::kNemotronH) {
      if (branch.rope_theta.has_value()) Add(where, " with rotary positions: it has none");
    } else if (!branch.rope_theta.has_value()) {
      Add(where, " without positions: it has rotary ones");
    } else if (theta_.has_value() && *theta_ != *branch.rope_theta) {
      Add(where, " with a rotary base of its own: it has one for all");
    } else {
      theta_ = branch.rope_theta;
    }
  }
  void CheckWidths() {
    const bool gated = spec_.activation == Activation::kSwiglu;
    const MambaSpec& mamba = spec_.mamba;
    if (Uses(spec_, BranchKind::kMlp) && of_ != HfClass::kAnnulus && gated == (of_ == HfClass::kNemotronH)) {
      Add("mlp.activation is ", gated ? "SWIGLU" : "RELU_SQUARED", ": it has the other");
    }
    if (spec_.rotary_dim > 0 && spec_.rotary_dim < spec_.head_dim && of_ != HfClass::kAnnulus) {
      Add("attention.rotary_dim=", spec_.rotary_dim, ": it turns whole heads");
    }
    if (of_ == HfClass::kNemotronH && spec_.tied_head) Add("tied_head: its head is its own");
    if (of_ == HfClass::kNemotronH && mamba.dt_max > 0) Add("mamba.dt_max: it has no upper limit");
    if (of_ == HfClass::kLlama && spec_.heads > 0 && spec_.d_model % spec_.heads != 0) {
      Add("d_model=", spec_.d_model, " is no multiple of attention.heads=", spec_.heads);
    }
    if (of_ == HfClass::kMamba2 && mamba.heads * mamba.head_dim % spec_.d_model != 0) {
      Add("mamba.heads * mamba.head_dim is no multiple of d_model");
    }
  }

  HfClass of_;
  const ModelSpec& spec_;
  const HfLayout& layout_;
  std::optional<double> theta_;
  std::vector<std::string> lines_;
};

}  // namespace

std::string Misfits(HfClass of, const ModelSpec& spec) { return Finder(of, spec).Find(); }

}  // namespace annulus
