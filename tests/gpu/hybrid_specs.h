#pragma once

// Small models with heads that the GPU's kernels for bf16 take, one for each kind of layer and mixtures.

#include "model/named_specs.h"

namespace annulus::testing {

inline ModelSpec HybridSpec(std::vector<LayerSpec> layers) {
  return {.d_model = 64,
          .vocab_size = 97,
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 64,
          .d_ff = 104,
          .norm_eps = 1e-5,
          .init_stddev = 0.1,  // attention far from uniform, gates far from linear
          .tied_head = false,
          .layers = std::move(layers),
          .latent = {.heads = 4, .q_rank = 48, .kv_rank = 64, .nope_dim = 32, .rope_dim = 32, .v_dim = 64},
          .mamba = {.heads = 8, .head_dim = 64, .state = 64, .groups = 2, .chunk = 128},
          .lightning = {.heads = 4, .key_dim = 64, .value_dim = 64, .chunk = 128},
          .based = {.heads = 4, .key_dim = 8, .value_dim = 32, .chunk = 64},
          .delta = {.heads = 4, .key_dim = 64, .value_dim = 64, .conv = 4, .chunk = 64}};
}
// Sizes of states that the kernels for tensor cores do not take.
inline ModelSpec WithSmallStates(ModelSpec spec) {
  spec.mamba = {.heads = 8, .head_dim = 12, .state = 20, .groups = 1, .chunk = 32, .dt_max = 2};
  spec.lightning = {.heads = 4, .key_dim = 12, .value_dim = 20, .chunk = 32};
  spec.delta = {.heads = 4, .key_dim = 12, .value_dim = 20, .conv = 0, .chunk = 16};
  return spec;
}
// Where a state holds one token its output's direction is the sign of q k, which rounding decides if it is
// near zero; what follows from that must not outweigh everything else.
inline ModelSpec WithCoarseNorms(ModelSpec spec) {
  spec.norm_eps = 1e-2;
  return spec;
}
// The heads of DeepSeek-V2, queries not compressed.
inline ModelSpec WithWideLatentHeads(ModelSpec spec) {
  spec.latent = {.heads = 2, .q_rank = 0, .kv_rank = 64, .nope_dim = 128, .rope_dim = 64, .v_dim = 128};
  return spec;
}

inline std::vector<NamedSpec> HybridSpecs() {
  const auto attention = [](int64_t window) { return AttentionBranch(window, 10000.0); };
  const BranchSpec mamba = {.kind = BranchKind::kMamba};
  const LayerSpec m = Recurrent(BranchKind::kMamba), l = Recurrent(BranchKind::kLightning),
                  b = Recurrent(BranchKind::kBased), g = Recurrent(BranchKind::kDeltaNet);
  BranchSpec takes = attention(48);
  takes.kv_layers_back = 1;
  // No number of ranks divides 293; its parts are longer than a chunk and no multiple of it.
  const BatchShape whole{.length = 293, .batch = 2};
  const BatchShape documents{
      .length = 293, .batch = 2, .lengths = Lengths::kRandom, .documents = Documents::kRandom};
  return {
      {"latent", HybridSpec({Latent(1, 0, 10000.0), Mlp(), Latent(1, 48, 10000.0)}), documents},
      {"latent_wide", WithWideLatentHeads(HybridSpec({Latent(1, 0, 10000.0), Mlp()})), whole},
      {"latent_branches", HybridSpec({Latent(2, 0, 10000.0), Mlp(), Latent(4, 0, 10000.0)}), documents},
      {"mamba", HybridSpec({m, Mlp(), m}), documents},
      {"mamba_small", WithSmallStates(HybridSpec({m, m})), documents},
      {"lightning", WithCoarseNorms(HybridSpec({l, Mlp(), l})), whole},
      {"lightning_small", WithCoarseNorms(WithSmallStates(HybridSpec({l, Mlp()}))), documents},
      {"based", HybridSpec({b, Mlp(), Layer({attention(32)})}), documents},
      {"delta_net", WithCoarseNorms(HybridSpec({g, Mlp(), g})), documents},
      {"delta_net_small", WithCoarseNorms(WithSmallStates(HybridSpec({g, Mlp()}))), whole},
      {"nemotron_h", WithReluSquared(HybridSpec({m, Mlp(), m, Attention(0, std::nullopt), Mlp()})),
       documents},
      {"mamba_tpla", HybridSpec({m, Mlp(), Latent(2, 0, 10000.0), Mlp()}), whole},
      {"falcon_h1", HybridSpec({Layer({mamba, attention(0)}), Mlp()}), documents},
      {"hymba",
       WithMeta(8, HybridSpec({Layer({mamba, attention(48)}, Combine::kMeanNorm),
                               Layer({mamba, takes}, Combine::kMeanNorm), Mlp()})),
       documents},
  };
}

}  // namespace annulus::testing
