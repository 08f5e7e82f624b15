#pragma once

// What a model is, as plain data: built by src/config from protobuf text or by tests by hand.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

// What a residual branch computes. The letters are those of the pattern language.
enum class BranchKind : char {
  kAttention = 'A',        // softmax attention
  kLatentAttention = 'T',  // latent attention: MLA, with latent_groups > 1 TPLA
  kMamba = 'M',            // Mamba-2
  kLightning = 'L',        // linear attention with a fixed decay
  kBased = 'B',            // linear attention with a Taylor feature map
  kDeltaNet = 'G',         // gated DeltaNet
  kMlp = '-',
};
const char* Name(BranchKind kind);   // "attention": of parameters, profiles and messages
bool MixesTokens(BranchKind kind);   // all but the MLP
bool PassesStates(BranchKind kind);  // M, L, B, G: along the sequence; others attend or do not mix

struct BranchSpec {
  BranchKind kind = BranchKind::kAttention;
  int64_t window = 0;                     // A, T: keys visible to a query, itself included; 0 = all
  std::optional<double> rope_theta = {};  // A, T: rotary base; nullopt = no position encoding
  int64_t kv_layers_back = 0;  // A: keys and values of the layer so many layers before; 0 = its own
  int64_t latent_groups = 1;   // T: branches of the latent (g)
  std::string tie = {};        // branches of one name share their parameters; empty = its own
  friend bool operator==(const BranchSpec&, const BranchSpec&) = default;
};

enum class Combine {
  kSum,       // y = x + sum of branch(RMSNorm(x))
  kMeanNorm,  // y = x + mean of RMSNorm(branch(RMSNorm(x))), a norm of its own for each branch (Hymba)
};

// A residual unit: branches side by side on one normed input.
struct LayerSpec {
  std::vector<BranchSpec> branches = {};  // at least one; each kind at most once
  Combine combine = Combine::kSum;
  friend bool operator==(const LayerSpec&, const LayerSpec&) = default;
};

// Changes of the rotary frequencies for sequences longer than those first trained on.
enum class RopeScalingKind { kNone, kLlama3, kYarn };
struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::kNone;
  double factor = 1;
  double original_length = 0;                        // tokens
  double low_freq_factor = 1, high_freq_factor = 4;  // Llama 3
  double beta_fast = 32, beta_slow = 1;              // YaRN
  double mscale = 1, mscale_all_dim = 0;             // YaRN, as DeepSeek uses them
  friend bool operator==(const RopeScaling&, const RopeScaling&) = default;
};

enum class Activation {
  kSwiglu,       // silu(gate) * up
  kReluSquared,  // relu(up)^2, without a gate
};

// Multi-head latent attention (DeepSeek-V2) and its tensor-parallel form.
struct LatentSpec {
  int64_t heads = 0;
  int64_t q_rank = 0;                             // of the compressed query; 0 = not compressed
  int64_t kv_rank = 0;                            // of the latent; a multiple of every branch's latent_groups
  int64_t nope_dim = 0, rope_dim = 0, v_dim = 0;  // of a head
  friend bool operator==(const LatentSpec&, const LatentSpec&) = default;
};

struct MambaSpec {
  int64_t heads = 0, head_dim = 0;  // inner width = heads * head_dim
  int64_t state = 0;                // N
  int64_t groups = 1;               // of B and C, and of the gated norm; divides heads
  int64_t conv = 4;
  int64_t chunk = 128;
  double dt_min = 0, dt_max = 0;  // dt is clamped to these; dt_max 0: not above
  friend bool operator==(const MambaSpec&, const MambaSpec&) = default;
};

// Linear attention: lightning, BASED, gated DeltaNet.
struct LinearSpec {
  int64_t heads = 0;
  int64_t key_dim = 0;    // of a head: BASED's features come from so many
  int64_t value_dim = 0;  // of a head
  int64_t conv = 4;       // gated DeltaNet: short convolutions on q, k, v; 0 = none
  int64_t chunk = 128;
  friend bool operator==(const LinearSpec&, const LinearSpec&) = default;
};

struct ModelSpec {
  int64_t d_model = 0;
  int64_t vocab_size = 0;
  int64_t heads = 0;     // query heads of attention
  int64_t kv_heads = 0;  // divides heads
  int64_t head_dim = 0;  // even
  int64_t rotary_dim = 0;  // of a head of attention the elements that turn, its last ones; 0 = all
  int64_t d_ff = 0;      // inner width of the MLP
  double norm_eps = 1e-5;
  double init_stddev = 0.02;  // projections back into the residual stream get init_stddev / sqrt(layers)
  bool tied_head = true;      // the output head is the embedding
  std::vector<LayerSpec> layers = {};
  Activation activation = Activation::kSwiglu;
  RopeScaling rope_scaling = {};
  LatentSpec latent = {};
  MambaSpec mamba = {};
  LinearSpec lightning = {}, based = {}, delta = {};
  int64_t meta_tokens = 0;  // learned embeddings before every sequence; not counted in its length
  friend bool operator==(const ModelSpec&, const ModelSpec&) = default;
};

bool Uses(const ModelSpec& spec, BranchKind kind);  // in any layer

// What is kept from forward for backward; the rest is recomputed.
enum class Recompute {
  kNone,             // keep every activation
  kElementwise,      // norms and SwiGLU run again: all that matrix products and attention made is kept
  kAttentionOutput,  // keep block inputs, attention output and its LSE: attention and exchange run once
  kBlock,            // keep block inputs only: attention and exchange run again
};

// Defaults that a layer takes where its pattern gives no attribute.
struct PatternDefaults {
  int64_t window = 0;                                 // A
  std::optional<double> rope_theta = 10000.0;         // A
  std::optional<double> latent_rope_theta = 10000.0;  // T
};

// What a pattern says: "[meta=n] layers".
struct Pattern {
  std::vector<LayerSpec> layers = {};
  int64_t meta_tokens = 0;
};

// Expands a pattern such as "meta=4 (M+A{w=128,combine=mean-norm} -)^3 (A{rope=none} -)" (the grammar stands
// in src/model/pattern.cc). Errors name the column, what stands there and what was expected.
absl::StatusOr<Pattern> ParsePattern(absl::string_view pattern, const PatternDefaults& defaults);

// Checks every field, one line a finding, with the names of the configuration:
// "model.attention.heads=6: expected a multiple of model.attention.kv_heads=4 (nearest valid value 4 or 8)".
absl::Status Validate(const ModelSpec& spec);

// Whether a valid model can be split over so many tensor-parallel ranks, one line a finding:
// "parallel.tp=3: expected a divisor of model.attention.heads=4 (nearest valid value 2 or 4)".
absl::Status ValidateShards(const ModelSpec& spec, int64_t tp);

}  // namespace annulus
