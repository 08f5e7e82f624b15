#pragma once

// What a model is, as plain data: built by src/config from protobuf text or by tests by hand.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

// One residual branch: y = x + f(RMSNorm(x)). The letters are those of the pattern language.
enum class LayerKind : char { kAttention = 'A', kMlp = '-' };

struct LayerSpec {
  LayerKind kind = LayerKind::kAttention;
  int64_t window = 0;                // attention: keys visible to a query, itself included; 0 = all
  std::optional<double> rope_theta;  // attention: rotary base; nullopt = no position encoding
  friend bool operator==(const LayerSpec&, const LayerSpec&) = default;
};

struct ModelSpec {
  int64_t d_model = 0;
  int64_t vocab_size = 0;
  int64_t heads = 0;     // query heads
  int64_t kv_heads = 0;  // divides heads
  int64_t head_dim = 0;  // even
  int64_t d_ff = 0;      // SwiGLU inner width
  double norm_eps = 1e-5;
  double init_stddev = 0.02;  // projections back into the residual stream get init_stddev / sqrt(layers)
  bool tied_head = true;      // the output head is the embedding
  std::vector<LayerSpec> layers;
  friend bool operator==(const ModelSpec&, const ModelSpec&) = default;
};

// What is kept from forward for backward; the rest is recomputed.
enum class Recompute {
  kNone,             // keep every activation
  kElementwise,      // norms and SwiGLU run again: all that matrix products and attention made is kept
  kAttentionOutput,  // keep block inputs, attention output and its LSE: attention and exchange run once
  kBlock,            // keep block inputs only: attention and exchange run again
};

// Defaults that a layer takes where its pattern gives no attribute.
struct PatternDefaults {
  int64_t window = 0;
  std::optional<double> rope_theta = 10000.0;
};

// Expands a pattern such as "(A{w=128} -)^3 (A{rope=none} -)" (the grammar stands in src/model/pattern.cc).
// Errors name the column, what stands there, and for letters that are planned but absent, that they are.
absl::StatusOr<std::vector<LayerSpec>> ParsePattern(absl::string_view pattern,
                                                    const PatternDefaults& defaults);

// Checks every field, one line a finding, with the names of the configuration:
// "model.attention.heads=6: expected a multiple of model.attention.kv_heads=4 (nearest valid value 4 or 8)".
absl::Status Validate(const ModelSpec& spec);

}  // namespace annulus
