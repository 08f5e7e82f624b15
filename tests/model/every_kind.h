#pragma once

// Layers and a small model with the sizes of every kind of branch, for tests of what follows from a spec
// alone.

#include "annulus/model/spec.h"

namespace annulus::testing {

inline LayerSpec Layer(BranchSpec branch) { return {.branches = {std::move(branch)}}; }
inline LayerSpec Layer(BranchKind kind) { return Layer(BranchSpec{.kind = kind}); }
inline constexpr BranchKind kKinds[] = {
    BranchKind::kAttention, BranchKind::kLatentAttention, BranchKind::kMamba, BranchKind::kLightning,
    BranchKind::kBased,     BranchKind::kDeltaNet,        BranchKind::kMlp};

// Every size differs from the others where it may.
inline ModelSpec EveryKind(std::vector<LayerSpec> layers) {
  return {.d_model = 16,
          .vocab_size = 29,
          .heads = 8,
          .kv_heads = 4,
          .head_dim = 6,
          .d_ff = 20,
          .init_stddev = 0.3,
          .tied_head = false,
          .layers = std::move(layers),
          .latent = {.heads = 8, .q_rank = 7, .kv_rank = 12, .nope_dim = 3, .rope_dim = 2, .v_dim = 5},
          .mamba = {.heads = 8, .head_dim = 9, .state = 11, .groups = 4, .conv = 4},
          .lightning = {.heads = 4, .key_dim = 3, .value_dim = 13},
          .based = {.heads = 4, .key_dim = 3, .value_dim = 10},
          .delta = {.heads = 4, .key_dim = 3, .value_dim = 14, .conv = 2}};
}

}  // namespace annulus::testing
