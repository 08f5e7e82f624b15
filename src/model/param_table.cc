// Which parameters a model has, how they are split over ranks and in which order they lie in memory.
//
// In a bucket those that every rank holds whole come first, so that one reduction sums their gradients over
// the tensor-parallel group. Matrices of one product are neighbours; where B and C of Mamba-2 are on every
// rank and x, z and dt are split, they meet at that border.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "annulus/model/params.h"

namespace annulus {
namespace {

using Parts = std::vector<std::pair<int64_t, int64_t>>;

// A parameter before it has a place.
struct Draft {
  ParamInfo info;
  bool border = false;  // its neighbours in memory may be on the other side of replicated | split
  bool wide = false;
};
using Drafts = std::vector<Draft>;

// What the rank holds of `logical`.
Shape LocalShape(const Shape& logical, int axis, const Parts& parts) {
  if (parts.empty()) return logical;
  int64_t held = 0;
  for (const auto& [begin, end] : parts) held += end - begin;
  if (logical.rank() == 1) return {held};
  return axis == 0 ? Shape{held, logical[1]} : Shape{logical[0], held};
}

// Collects the parameters behind one prefix.
class Collector {
 public:
  Collector(const ModelSpec& spec, TensorShard shard, std::string prefix, Drafts* drafts)
      : spec_(spec), shard_(shard), prefix_(std::move(prefix)), drafts_(*drafts) {}

  // This rank's of `units` of `width` rows or columns each.
  Parts Share(int64_t units, int64_t width = 1) const {
    const int64_t each = units / shard_.size * width;
    return {{shard_.rank * each, (shard_.rank + 1) * each}};
  }
  // The same where units may be fewer than ranks: then each rank holds all of them.
  Parts ShareOrAll(int64_t units, int64_t width) const {
    return units % shard_.size == 0 ? Share(units, width) : Parts{};
  }
  // Of rows that need not be a multiple of the ranks: the first have one more.
  Parts ShareRows(int64_t rows) const {
    const int64_t each = rows / shard_.size, more = rows % shard_.size;
    const auto begin = [&](int64_t rank) { return rank * each + std::min(rank, more); };
    return {{begin(shard_.rank), begin(shard_.rank + 1)}};
  }

  Draft& Matrix(absl::string_view name, int64_t out, int64_t in, Parts rows) {
    return Add(name, {out, in}, 0, std::move(rows), Init::kNormal, spec_.init_stddev, Decay::kWeightDecay);
  }
  // Branches add up in the residual stream: their outputs start smaller with depth (GPT-2's rule).
  Draft& Output(absl::string_view name, int64_t in, Parts columns) {
    const double stddev = spec_.init_stddev / std::sqrt(static_cast<double>(spec_.layers.size()));
    return Add(name, {spec_.d_model, in}, 1, std::move(columns), Init::kNormal, stddev, Decay::kWeightDecay);
  }
  Draft& Vector(absl::string_view name, int64_t n, Parts rows, Init init) {
    return Add(name, {n}, 0, std::move(rows), init, 0, Decay::kNone);
  }
  void Wide(absl::string_view name, int64_t heads, Init init) {
    Vector(name, heads, Share(heads), init).wide = true;
  }
  void ConvWeight(absl::string_view name, int64_t channels, int64_t width, Parts rows) {
    Add(name, {channels, width}, 0, std::move(rows), Init::kUniform, ConvBound(width), Decay::kWeightDecay);
  }
  void ConvBias(absl::string_view name, int64_t channels, int64_t width, Parts rows) {
    Add(name, {channels}, 0, std::move(rows), Init::kUniform, ConvBound(width), Decay::kNone);
  }

  const ModelSpec& spec() const { return spec_; }
  TensorShard shard() const { return shard_; }

 private:
  static double ConvBound(int64_t width) { return 1 / std::sqrt(static_cast<double>(width)); }
  Draft& Add(absl::string_view name, Shape logical, int axis, Parts parts, Init init, double stddev,
             Decay decay) {
    drafts_.push_back({.info = {.name = absl::StrCat(prefix_, name),
                                .shape = LocalShape(logical, axis, parts),
                                .logical = logical,
                                .axis = axis,
                                .parts = std::move(parts),
                                .init = init,
                                .stddev = stddev,
                                .decay = decay}});
    return drafts_.back();
  }

  const ModelSpec& spec_;
  TensorShard shard_;
  std::string prefix_;
  Drafts& drafts_;
};

void AddAttention(const BranchSpec& branch, Collector& to) {
  const ModelSpec& spec = to.spec();
  const int64_t d = spec.d_model, q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim;
  to.Matrix("q.weight", q, d, to.Share(spec.heads, spec.head_dim));
  if (branch.kv_layers_back == 0) {
    to.Matrix("k.weight", kv, d, to.ShareOrAll(spec.kv_heads, spec.head_dim));
    to.Matrix("v.weight", kv, d, to.ShareOrAll(spec.kv_heads, spec.head_dim));
  }
  to.Output("o.weight", q, to.Share(spec.heads, spec.head_dim));
}

void AddLatent(const BranchSpec& branch, Collector& to) {
  const LatentSpec& latent = to.spec().latent;
  const int64_t d = to.spec().d_model, groups = branch.latent_groups, columns = latent.kv_rank / groups;
  if (latent.q_rank > 0) {
    to.Vector("q_norm.weight", latent.q_rank, {}, Init::kOnes);
    to.Matrix("q_down.weight", latent.q_rank, d, {});
  }
  to.Vector("kv_norm.weight", latent.kv_rank, {}, Init::kOnes);
  to.Matrix("kv_down.weight", latent.kv_rank, d, {});
  to.Matrix("k_rope.weight", latent.rope_dim, d, {});
  const int64_t q_dim = latent.nope_dim + latent.rope_dim;
  to.Matrix("q_up.weight", latent.heads * q_dim, latent.q_rank > 0 ? latent.q_rank : d,
            to.Share(latent.heads, q_dim));
  const LatentShard mesh = LatentShardOf(to.shard(), groups);
  const int64_t kv_dim = latent.nope_dim + latent.v_dim, rows = latent.heads / mesh.head_groups * kv_dim;
  for (int64_t b = 0; b < groups; ++b) {
    const int64_t begin = mesh.head_group * rows;
    to.Matrix(absl::StrCat("kv_up.", b, ".weight"), latent.heads * kv_dim, columns,
              {{begin, mesh.Holds(b) ? begin + rows : begin}});
  }
  to.Output("o.weight", latent.heads * latent.v_dim, to.Share(latent.heads, latent.v_dim));
}

void AddMamba(Collector& to) {
  const MambaSpec& mamba = to.spec().mamba;
  const int64_t d = to.spec().d_model, k = mamba.conv;
  const int64_t inner = mamba.heads * mamba.head_dim, bc = mamba.groups * mamba.state;
  const Parts heads = to.Share(mamba.heads, mamba.head_dim),
              groups = to.ShareOrAll(mamba.groups, mamba.state);
  for (const char* name : {"b.weight", "c.weight"}) to.Matrix(name, bc, d, groups).border = true;
  for (const char* name : {"x.weight", "z.weight"}) to.Matrix(name, inner, d, heads).border = true;
  to.Matrix("dt.weight", mamba.heads, d, to.Share(mamba.heads)).border = true;
  to.Output("out.weight", inner, heads);
  to.ConvWeight("conv_b.weight", bc, k, groups);
  to.ConvWeight("conv_c.weight", bc, k, groups);
  to.ConvWeight("conv_x.weight", inner, k, heads);
  to.ConvBias("conv_b.bias", bc, k, groups);
  to.ConvBias("conv_c.bias", bc, k, groups);
  to.ConvBias("conv_x.bias", inner, k, heads);
  to.Vector("norm.weight", inner, heads, Init::kOnes);
  to.Wide("a_log", mamba.heads, Init::kMambaDecay);
  to.Wide("d", mamba.heads, Init::kOnes);
  to.Wide("dt_bias", mamba.heads, Init::kMambaTimeStep);
}

// q, k and v of linear attention.
void AddQkv(const LinearSpec& linear, Collector& to) {
  const int64_t d = to.spec().d_model, keys = linear.heads * linear.key_dim;
  to.Matrix("q.weight", keys, d, to.Share(linear.heads, linear.key_dim));
  to.Matrix("k.weight", keys, d, to.Share(linear.heads, linear.key_dim));
  to.Matrix("v.weight", linear.heads * linear.value_dim, d, to.Share(linear.heads, linear.value_dim));
}

void AddLightning(Collector& to) {
  const LinearSpec& linear = to.spec().lightning;
  const int64_t values = linear.heads * linear.value_dim;
  const Parts heads = to.Share(linear.heads, linear.value_dim);
  AddQkv(linear, to);
  to.Matrix("gate.weight", values, to.spec().d_model, heads);
  to.Output("out.weight", values, heads);
  to.Vector("norm.weight", linear.value_dim, {}, Init::kOnes);
}

void AddBased(Collector& to) {
  const LinearSpec& linear = to.spec().based;
  AddQkv(linear, to);
  to.Output("out.weight", linear.heads * linear.value_dim, to.Share(linear.heads, linear.value_dim));
}

void AddDeltaNet(Collector& to) {
  const LinearSpec& linear = to.spec().delta;
  const int64_t d = to.spec().d_model, keys = linear.heads * linear.key_dim;
  const int64_t values = linear.heads * linear.value_dim;
  const Parts key_rows = to.Share(linear.heads, linear.key_dim);
  const Parts value_rows = to.Share(linear.heads, linear.value_dim);
  AddQkv(linear, to);
  to.Matrix("gate.weight", values, d, value_rows);
  to.Matrix("beta.weight", linear.heads, d, to.Share(linear.heads));
  to.Matrix("decay.weight", linear.heads, d, to.Share(linear.heads));
  to.Output("out.weight", values, value_rows);
  if (linear.conv > 0) {
    to.ConvWeight("conv_q.weight", keys, linear.conv, key_rows);
    to.ConvWeight("conv_k.weight", keys, linear.conv, key_rows);
    to.ConvWeight("conv_v.weight", values, linear.conv, value_rows);
  }
  to.Vector("norm.weight", linear.value_dim, {}, Init::kOnes);
  to.Wide("a_log", linear.heads, Init::kMambaDecay);
  to.Wide("dt_bias", linear.heads, Init::kMambaTimeStep);
}

void AddMlp(Collector& to) {
  const ModelSpec& spec = to.spec();
  const Parts inner = to.Share(spec.d_ff);
  if (spec.activation == Activation::kSwiglu) to.Matrix("gate.weight", spec.d_ff, spec.d_model, inner);
  to.Matrix("up.weight", spec.d_ff, spec.d_model, inner);
  to.Output("down.weight", spec.d_ff, inner);
}

void AddBranch(const BranchSpec& branch, Collector to) {
  switch (branch.kind) {
    case BranchKind::kAttention:
      return AddAttention(branch, to);
    case BranchKind::kLatentAttention:
      return AddLatent(branch, to);
    case BranchKind::kMamba:
      return AddMamba(to);
    case BranchKind::kLightning:
      return AddLightning(to);
    case BranchKind::kBased:
      return AddBased(to);
    case BranchKind::kDeltaNet:
      return AddDeltaNet(to);
    case BranchKind::kMlp:
      return AddMlp(to);
  }
}

// Replicated, those of them at the border, split ones at the border, the others.
int OrderInBucket(const Draft& draft) {
  const bool split = !draft.info.parts.empty();
  return split ? (draft.border ? 2 : 3) : (draft.border ? 1 : 0);
}

class TableBuilder {
 public:
  void AddBucket(Drafts drafts, BucketUse use) {
    Drafts here;
    for (Draft& draft : drafts) (draft.wide ? wide_ : here).push_back(std::move(draft));
    Append(std::move(here), {.use = use});
  }
  ParamTable Finish() {
    if (!wide_.empty()) Append(std::move(wide_), {.use = BucketUse::kShared, .wide = true});
    return std::move(table_);
  }

 private:
  void Append(Drafts drafts, Bucket bucket) {
    std::stable_sort(drafts.begin(), drafts.end(),
                     [](const Draft& a, const Draft& b) { return OrderInBucket(a) < OrderInBucket(b); });
    for (Draft& draft : drafts) {
      draft.info.bucket = static_cast<int>(table_.buckets.size());
      draft.info.offset = bucket.elements;
      bucket.elements += draft.info.shape.elements();
      if (draft.info.parts.empty()) bucket.replicated = bucket.elements;
      table_.params.push_back(std::move(draft.info));
    }
    table_.buckets.push_back(bucket);
  }

  ParamTable table_;
  Drafts wide_;
};

}  // namespace

LatentShard LatentShardOf(TensorShard shard, int64_t latent_groups) {
  const int split = static_cast<int>(std::gcd<int64_t>(latent_groups, shard.size));
  return {.head_groups = shard.size / split,
          .head_group = shard.rank / split,
          .latent_groups = split,
          .latent_group = shard.rank % split};
}

std::string ParamPrefix(const ModelSpec& spec, size_t layer, size_t branch) {
  const BranchSpec& of = spec.layers[layer].branches[branch];
  const std::string owner = of.tie.empty() ? absl::StrCat("layers.", layer) : absl::StrCat("tied.", of.tie);
  return absl::StrCat(owner, ".", Name(of.kind), ".");
}

ParamTable BuildParamTable(const ModelSpec& spec, TensorShard shard) {
  TableBuilder builder;
  Drafts embedding;
  Collector ends(spec, shard, "", &embedding);
  ends.Matrix("embed.weight", spec.vocab_size, spec.d_model, ends.ShareRows(spec.vocab_size));
  // Behind the embedding's rows, so that one lookup finds both.
  if (spec.meta_tokens > 0) {
    const int64_t held = shard.rank == 0 ? spec.meta_tokens : 0;
    ends.Matrix("meta.weight", spec.meta_tokens, spec.d_model, {{0, held}});
  }
  builder.AddBucket(std::move(embedding), BucketUse::kEnds);

  std::vector<std::pair<std::string, Drafts>> tied;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    Drafts drafts;
    Collector own(spec, shard, absl::StrCat("layers.", i, "."), &drafts);
    own.Vector("norm.weight", spec.d_model, {}, Init::kOnes);
    for (size_t b = 0; b < layer.branches.size(); ++b) {
      const BranchSpec& branch = layer.branches[b];
      if (layer.combine == Combine::kMeanNorm) {
        own.Vector(absl::StrCat("combine.", Name(branch.kind), ".weight"), spec.d_model, {}, Init::kOnes);
      }
      const std::string prefix = ParamPrefix(spec, i, b);
      if (branch.tie.empty()) {
        AddBranch(branch, Collector(spec, shard, prefix, &drafts));
      } else if (std::none_of(tied.begin(), tied.end(), [&](auto& t) { return t.first == prefix; })) {
        tied.emplace_back(prefix, Drafts());
        AddBranch(branch, Collector(spec, shard, prefix, &tied.back().second));
      }
    }
    builder.AddBucket(std::move(drafts), BucketUse::kLayer);
  }

  Drafts last;
  Collector head(spec, shard, "", &last);
  head.Vector("final_norm.weight", spec.d_model, {}, Init::kOnes);
  if (!spec.tied_head) {
    head.Matrix("head.weight", spec.vocab_size, spec.d_model, head.ShareRows(spec.vocab_size));
  }
  builder.AddBucket(std::move(last), BucketUse::kEnds);
  for (auto& [prefix, drafts] : tied) builder.AddBucket(std::move(drafts), BucketUse::kShared);
  return builder.Finish();
}

}  // namespace annulus
