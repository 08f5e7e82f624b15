#pragma once

// Small models that every test of a whole decoder runs through: on any mesh the numbers of one rank,
// gradients against differences, recompute policies bit for bit, causality. A new kind of branch is one line
// here.

#include <string>
#include <vector>

#include "model/mesh_run.h"

namespace annulus::testing {

struct NamedSpec {
  const char* name;
  ModelSpec spec;
  BatchShape batch;  // lengths that no number of ranks divides

  bool Has(bool (*property)(BranchKind)) const {
    for (const LayerSpec& layer : spec.layers) {
      for (const BranchSpec& branch : layer.branches) {
        if (property(branch.kind)) return true;
      }
    }
    return false;
  }
  bool passes_states() const { return Has(PassesStates); }
  bool attends() const {
    return Has([](BranchKind kind) { return MixesTokens(kind) && !PassesStates(kind); });
  }
  // That its branches can run in.
  std::vector<LayoutKind> layouts() const {
    std::vector<LayoutKind> kinds = {LayoutKind::kContiguous, LayoutKind::kZigzag};
    if (!passes_states()) kinds.push_back(LayoutKind::kStriped);
    return kinds;
  }
};

inline BranchSpec Tied(BranchSpec branch, std::string name) {
  branch.tie = std::move(name);
  return branch;
}
inline LayerSpec AttentionOfLayersBack(int64_t layers, int64_t window) {
  BranchSpec branch = AttentionBranch(window);
  branch.kv_layers_back = layers;
  return Layer({branch});
}
inline ModelSpec WithMeta(int64_t tokens, ModelSpec spec) {
  spec.meta_tokens = tokens;
  return spec;
}
inline ModelSpec WithReluSquared(ModelSpec spec) {
  spec.activation = Activation::kReluSquared;
  return spec;
}
inline ModelSpec WithRotary(int64_t dim, ModelSpec spec) {
  spec.rotary_dim = dim;
  return spec;
}
// 12 query heads with one KV head: splits over 1, 2, 3 and 4 ranks.
inline ModelSpec WithOneKvHead(ModelSpec spec) {
  spec.heads = 12, spec.kv_heads = 1, spec.head_dim = 4, spec.d_ff = 24;
  return spec;
}

// Every size of a head differs from the others.
inline LayerSpec Latent(int64_t groups, int64_t window = 0, std::optional<double> rope_theta = 100.0) {
  return Layer({{.kind = BranchKind::kLatentAttention,
                 .window = window,
                 .rope_theta = rope_theta,
                 .latent_groups = groups}});
}
inline ModelSpec WithLatents(int64_t q_rank, ModelSpec spec) {
  spec.latent = {.heads = 4, .q_rank = q_rank, .kv_rank = 12, .nope_dim = 3, .rope_dim = 4, .v_dim = 5};
  return spec;
}
inline ModelSpec WithYarn(ModelSpec spec) {
  spec.rope_scaling = {.kind = RopeScalingKind::kYarn,
                       .factor = 4,
                       .original_length = 16,
                       .beta_fast = 2,
                       .mscale = 1.5,
                       .mscale_all_dim = 0.7};
  return spec;
}

// Layers that hand states along the sequence. Twelve heads split over 2, 3 and 4 ranks; chunks are shorter
// than segments, and segments of many ranks shorter than convolutions.
inline LayerSpec Recurrent(BranchKind kind) { return Layer({{.kind = kind}}); }
inline ModelSpec WithStates(int64_t groups, int64_t conv, ModelSpec spec) {
  spec.mamba = {.heads = 12, .head_dim = 3, .state = 5, .groups = groups, .conv = 4, .chunk = 8, .dt_max = 2};
  spec.lightning = {.heads = 12, .key_dim = 3, .value_dim = 5, .chunk = 8};
  spec.based = {.heads = 12, .key_dim = 2, .value_dim = 3, .chunk = 8};
  spec.delta = {.heads = 12, .key_dim = 3, .value_dim = 4, .conv = conv, .chunk = 4};
  return spec;
}

inline std::vector<NamedSpec> NamedSpecs() {
  const BranchSpec attention = AttentionBranch(0), window = AttentionBranch(5), mlp = MlpBranch();
  const BatchShape whole{.length = 37, .batch = 2};
  const BatchShape documents{.length = 37, .batch = 2, .documents = Documents::kRandom};
  const BatchShape mixed{
      .length = 41, .batch = 4, .lengths = Lengths::kRandom, .documents = Documents::kRandom};
  const Combine mean = Combine::kMeanNorm;
  return {
      {"causal", SmallSpec({Attention(0), Mlp(), Attention(0), Mlp()}), whole},
      {"window", SmallSpec({Attention(7), Mlp(), Attention(7), Mlp()}), whole},
      {"documents", SmallSpec({Attention(0), Mlp(), Attention(0), Mlp()}), documents},
      {"mixed", SmallSpec({Attention(5), Mlp(), Attention(0, std::nullopt), Mlp()}), mixed},
      {"partial_rotary", WithRotary(4, SmallSpec({Attention(0), Mlp(), Attention(5)})), documents},
      {"one_kv_head", WithOneKvHead(SmallSpec({Attention(0), Mlp(), Attention(6), Mlp()})), documents},
      {"relu_squared", WithReluSquared(SmallSpec({Attention(0), Mlp(), Mlp()})), whole},
      {"parallel_sum", SmallSpec({Layer({attention, mlp}), Layer({window, mlp})}), documents},
      {"parallel_mean_norm", SmallSpec({Layer({attention, mlp}, mean), Mlp(), Layer({window}, mean)}),
       documents},
      {"shared_kv",
       SmallSpec({Attention(0), Mlp(), AttentionOfLayersBack(2, 0), AttentionOfLayersBack(3, 4)}), documents},
      {"tied",
       SmallSpec({Layer({Tied(attention, "a")}), Layer({Tied(mlp, "f")}), Mlp(),
                  Layer({Tied(attention, "a")}), Layer({Tied(mlp, "f")})}),
       documents},
      {"meta_tokens", WithMeta(3, SmallSpec({Attention(0), Mlp(), Attention(9), Mlp()})), mixed},
      {"latent", WithLatents(6, SmallSpec({Latent(1), Mlp(), Latent(1, 7)})), documents},
      {"latent_full_queries", WithYarn(WithLatents(0, SmallSpec({Latent(1), Mlp(), Latent(1, 0, {})}))),
       mixed},
      {"latent_branches", WithLatents(6, SmallSpec({Latent(2), Mlp(), Latent(4)})), documents},
      {"mamba",
       WithStates(12, 3, SmallSpec({Recurrent(BranchKind::kMamba), Mlp(), Recurrent(BranchKind::kMamba)})),
       mixed},
      {"mamba_one_group", WithStates(1, 3, SmallSpec({Recurrent(BranchKind::kMamba), Mlp()})), documents},
      {"mamba_two_groups", WithStates(2, 3, SmallSpec({Recurrent(BranchKind::kMamba), Mlp()})), whole},
      {"mamba_beside_attention",
       WithStates(2, 3, SmallSpec({Layer({{.kind = BranchKind::kMamba}, window}, mean), Mlp()})), documents},
      {"lightning",
       WithStates(2, 3,
                  SmallSpec({Recurrent(BranchKind::kLightning), Mlp(), Recurrent(BranchKind::kLightning)})),
       mixed},
      {"based", WithStates(2, 3, SmallSpec({Recurrent(BranchKind::kBased), Mlp(), Attention(4)})), mixed},
      {"delta_net", WithStates(2, 3, SmallSpec({Recurrent(BranchKind::kDeltaNet), Mlp()})), mixed},
      {"delta_net_without_convolution",
       WithStates(2, 0, SmallSpec({Recurrent(BranchKind::kDeltaNet), Mlp()})), documents},
  };
}

// One of the list.
inline const NamedSpec& NamedSpecOf(const std::string& name) {
  static const std::vector<NamedSpec> all = NamedSpecs();
  for (const NamedSpec& named : all) {
    if (name == named.name) return named;
  }
  ANNULUS_CHECK(false) << "no spec " << name;
  return all[0];
}

// Tests that run through the list: TEST_P(X, ...) with GetParam() an element.
class OnNamedSpecs : public ::testing::TestWithParam<NamedSpec> {};
inline std::string NameOfSpec(const ::testing::TestParamInfo<NamedSpec>& info) { return info.param.name; }
inline void PrintTo(const NamedSpec& named, std::ostream* out) { *out << named.name; }

}  // namespace annulus::testing
