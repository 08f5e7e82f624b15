#include "tensor_names.h"

#include <cstring>

#include "absl/strings/str_replace.h"

namespace annulus {
namespace {

// A tensor of a branch and the parameters that it is put together from.
struct Names {
  enum class Join { kRows, kColumns, kChannels };  // kChannels: rows, and the shape is [rows, 1, columns]
  const char* tensor;
  std::vector<const char*>
      params;  // "*": one for each branch of the latent; those that do not exist are left out
  Join join = Join::kRows;
  const char* beside = nullptr;   // only where this parameter exists
  const char* without = nullptr;  // only where it does not
};

const std::vector<Names>& NamesOf(BranchKind kind) {
  static const std::vector<Names> attention = {{"q_proj.weight", {"q.weight"}},
                                               {"k_proj.weight", {"k.weight"}},
                                               {"v_proj.weight", {"v.weight"}},
                                               {"o_proj.weight", {"o.weight"}}};
  static const std::vector<Names> latent = {
      {"q_a_proj.weight", {"q_down.weight"}},
      {"q_a_layernorm.weight", {"q_norm.weight"}},
      {.tensor = "q_b_proj.weight", .params = {"q_up.weight"}, .beside = "q_down.weight"},
      {.tensor = "q_proj.weight", .params = {"q_up.weight"}, .without = "q_down.weight"},
      {"kv_a_proj_with_mqa.weight", {"kv_down.weight", "k_rope.weight"}},
      {"kv_a_layernorm.weight", {"kv_norm.weight"}},
      {"kv_b_proj.weight", {"kv_up.*.weight"}, Names::Join::kColumns},
      {"o_proj.weight", {"o.weight"}}};
  static const std::vector<Names> mamba = {
      {"in_proj.weight", {"z.weight", "x.weight", "b.weight", "c.weight", "dt.weight"}},
      {"conv1d.weight", {"conv_x.weight", "conv_b.weight", "conv_c.weight"}, Names::Join::kChannels},
      {"conv1d.bias", {"conv_x.bias", "conv_b.bias", "conv_c.bias"}},
      {"dt_bias", {"dt_bias"}},
      {"A_log", {"a_log"}},
      {"D", {"d"}},
      {"norm.weight", {"norm.weight"}},
      {"out_proj.weight", {"out.weight"}}};
  static const std::vector<Names> mlp = {{"gate_proj.weight", {"gate.weight"}},
                                         {"up_proj.weight", {"up.weight"}},
                                         {"down_proj.weight", {"down.weight"}}};
  switch (kind) {
    case BranchKind::kAttention:
      return attention;
    case BranchKind::kLatentAttention:
      return latent;
    case BranchKind::kMamba:
      return mamba;
    case BranchKind::kMlp:
      return mlp;
    default:
      break;
  }
  ANNULUS_CHECK(false) << Name(kind) << " has no names";
  return mlp;
}

// Index of a parameter; -1 if there is none.
int Find(const ParamTable& table, absl::string_view name) {
  for (size_t i = 0; i < table.params.size(); ++i) {
    if (table.params[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

class Collector {
 public:
  Collector(const ModelSpec& spec, const ParamTable& table, RopePairs pairs)
      : spec_(spec), table_(table), pairs_(pairs) {}

  void Add(std::string tensor, const std::string& param) {
    Join(std::move(tensor), {table_.IndexOf(param)}, Names::Join::kRows);
  }
  void AddBranch(size_t layer, size_t branch, const std::string& tensor_prefix) {
    const std::string prefix = ParamPrefix(spec_, layer, branch);
    const BranchSpec& of = spec_.layers[layer].branches[branch];
    for (const Names& names : NamesOf(of.kind)) {
      if (names.beside != nullptr && Find(table_, prefix + names.beside) < 0) continue;
      if (names.without != nullptr && Find(table_, prefix + names.without) >= 0) continue;
      std::vector<int> params;
      for (const char* name : names.params) {
        for (int64_t g = 0; g < of.latent_groups; ++g) {
          const int param = Find(table_, prefix + absl::StrReplaceAll(name, {{"*", absl::StrCat(g)}}));
          if (param >= 0 && (params.empty() || params.back() != param)) params.push_back(param);
        }
      }
      if (!params.empty()) Join(tensor_prefix + names.tensor, params, names.join);
    }
  }
  std::vector<HfTensor> Finish() { return std::move(tensors_); }

 private:
  const ParamInfo& InfoOf(int param) const { return table_.params[static_cast<size_t>(param)]; }

  void Join(std::string tensor, const std::vector<int>& params, Names::Join join) {
    HfTensor to{.name = std::move(tensor), .shape = {}, .parts = {}};
    int64_t rows = 0, columns = 0;
    for (const int param : params) {
      const Shape& shape = InfoOf(param).logical;
      const int64_t width = shape.rank() == 1 ? 1 : shape[1];
      const bool beside = join == Names::Join::kColumns;
      to.parts.push_back({.param = param, .row = beside ? 0 : rows, .column = beside ? columns : 0});
      OrderRows(&to.parts.back());
      rows = beside ? shape[0] : rows + shape[0];
      columns = beside ? columns + width : width;
    }
    const bool vector = InfoOf(params.front()).logical.rank() == 1;
    to.shape = vector                           ? Shape{rows}
               : join == Names::Join::kChannels ? Shape{rows, 1, columns}
                                                : Shape{rows, columns};
    tensors_.push_back(std::move(to));
  }
  void OrderRows(HfPart* part) const {
    if (pairs_ == RopePairs::kHalves) return;
    const std::string& name = InfoOf(part->param).name;
    const LatentSpec& latent = spec_.latent;
    const auto ends_with = [&](absl::string_view end) {
      return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end.data()) == 0;
    };
    if (ends_with("latent.k_rope.weight")) part->period = part->rope_rows = latent.rope_dim;
    if (ends_with("latent.q_up.weight")) {
      part->period = latent.nope_dim + latent.rope_dim, part->rope_rows = latent.rope_dim;
    }
  }

  const ModelSpec& spec_;
  const ParamTable& table_;
  RopePairs pairs_;
  std::vector<HfTensor> tensors_;
};

float Load(const BFloat16& x) { return ToFloat(x); }
float Load(float x) { return x; }
double Load(double x) { return x; }
template <typename To>
To Store(double x) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    return ToBFloat16(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

template <typename Fn>
void VisitStored(DType dtype, Fn&& fn) {
  if (dtype == DType::kBF16) return fn.template operator()<BFloat16>();
  VisitFloat(dtype, std::forward<Fn>(fn));
}

template <typename To, typename From>
void CopyRow(const void* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    From x;
    std::memcpy(&x, static_cast<const From*>(from) + i, sizeof(From));
    const To y = Store<To>(Load(x));
    std::memcpy(static_cast<To*>(to) + i, &y, sizeof(To));
  }
}

int64_t Width(const Shape& shape) { return shape.rank() == 1 ? 1 : shape[shape.rank() - 1]; }

// The tensor's row of our row r.
int64_t TensorRow(const HfPart& part, int64_t r) {
  if (part.rope_rows == 0) return part.row + r;
  const int64_t head = r / part.period * part.period, half = part.rope_rows / 2;
  const int64_t i = r - head - (part.period - part.rope_rows);
  if (i < 0) return part.row + r;
  return part.row + head + (part.period - part.rope_rows) + (i < half ? 2 * i : 2 * (i - half) + 1);
}

template <typename Byte>
Byte* At(Byte* data, DType dtype, int64_t element) {
  using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
  return static_cast<Char*>(data) + element * SizeOf(dtype);
}

}  // namespace

const HfLayout& LayoutOf(HfClass of) {
  using K = BranchKind;
  static const HfLayout llama = {"LlamaForCausalLM",
                                 "llama",
                                 "model.embed_tokens.weight",
                                 "model.layers.",
                                 "model.norm.weight",
                                 {{"input_layernorm.weight", {{K::kAttention, "self_attn."}}},
                                  {"post_attention_layernorm.weight", {{K::kMlp, "mlp."}}}}};
  static const HfLayout deepseek = {"DeepseekV3ForCausalLM",
                                    "deepseek_v3",
                                    "model.embed_tokens.weight",
                                    "model.layers.",
                                    "model.norm.weight",
                                    {{"input_layernorm.weight", {{K::kLatentAttention, "self_attn."}}},
                                     {"post_attention_layernorm.weight", {{K::kMlp, "mlp."}}}}};
  static const HfLayout mamba = {"Mamba2ForCausalLM",          "mamba2",
                                 "backbone.embeddings.weight", "backbone.layers.",
                                 "backbone.norm_f.weight",     {{"norm.weight", {{K::kMamba, "mixer."}}}}};
  static const HfLayout nemotron = {"NemotronHForCausalLM",
                                    "nemotron_h",
                                    "backbone.embeddings.weight",
                                    "backbone.layers.",
                                    "backbone.norm_f.weight",
                                    {{"norm.weight",
                                      {{K::kMamba, "mixer."}, {K::kAttention, "mixer."}, {K::kMlp, "mixer."}},
                                      HfLayout::Takes::kOne}}};
  static const HfLayout falcon = {
      "FalconH1ForCausalLM",
      "falcon_h1",
      "model.embed_tokens.weight",
      "model.layers.",
      "model.final_layernorm.weight",
      {{"input_layernorm.weight", {{K::kMamba, "mamba."}, {K::kAttention, "self_attn."}}},
       {"pre_ff_layernorm.weight", {{K::kMlp, "feed_forward."}}}}};
  static const HfLayout annulus = {"AnnulusForCausalLM",
                                   "annulus",
                                   "model.embed_tokens.weight",
                                   "model.layers.",
                                   "model.norm.weight",
                                   {{"norm.weight",
                                     {{K::kAttention, "self_attn."},
                                      {K::kLatentAttention, "latent_attn."},
                                      {K::kMamba, "mamba."},
                                      {K::kMlp, "mlp."}},
                                     HfLayout::Takes::kSome}}};
  switch (of) {
    case HfClass::kLlama:
      return llama;
    case HfClass::kDeepseekV3:
      return deepseek;
    case HfClass::kMamba2:
      return mamba;
    case HfClass::kNemotronH:
      return nemotron;
    case HfClass::kFalconH1:
      return falcon;
    case HfClass::kAnnulus:
      return annulus;
  }
  return annulus;
}

std::vector<HfTensor> HfTensors(HfClass of, const ModelSpec& spec, const ParamTable& table, RopePairs pairs) {
  const HfLayout& layout = LayoutOf(of);
  Collector collector(spec, table, pairs);
  collector.Add(layout.embedding, "embed.weight");
  const size_t together = layout.block.size();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const HfLayout::Layer& here = layout.block[i % together];
    const std::string prefix = absl::StrCat(layout.layers, i / together, ".");
    collector.Add(prefix + here.norm, absl::StrCat("layers.", i, ".norm.weight"));
    for (size_t b = 0; b < spec.layers[i].branches.size(); ++b) {
      for (const HfLayout::Place& place : here.branches) {
        if (place.kind == spec.layers[i].branches[b].kind) collector.AddBranch(i, b, prefix + place.prefix);
      }
    }
  }
  collector.Add(layout.final_norm, "final_norm.weight");
  if (!spec.tied_head) collector.Add("lm_head.weight", "head.weight");
  return collector.Finish();
}

void Pack(const HfPart& part, ConstTensorRef param, TensorRef tensor) {
  const int64_t rows = param.dim(0), columns = Width(param.shape()), width = Width(tensor.shape());
  VisitStored(param.dtype(), [&]<class From>() {
    VisitStored(tensor.dtype(), [&]<class To>() {
      for (int64_t r = 0; r < rows; ++r) {
        CopyRow<To, From>(At(param.raw(), param.dtype(), r * columns),
                          At(tensor.raw(), tensor.dtype(), TensorRow(part, r) * width + part.column),
                          columns);
      }
    });
  });
}

void Unpack(const HfPart& part, ConstTensorRef tensor, TensorRef param) {
  const int64_t rows = param.dim(0), columns = Width(param.shape()), width = Width(tensor.shape());
  VisitStored(tensor.dtype(), [&]<class From>() {
    VisitStored(param.dtype(), [&]<class To>() {
      for (int64_t r = 0; r < rows; ++r) {
        CopyRow<To, From>(At(tensor.raw(), tensor.dtype(), TensorRow(part, r) * width + part.column),
                          At(param.raw(), param.dtype(), r * columns), columns);
      }
    });
  });
}

}  // namespace annulus
