// FLOPs of training. Counted are products of matrices and the scans in their chunked form; norms, gates and
// activations are left out.

#include <algorithm>
#include <map>

#include "annulus/model/cost.h"
#include "annulus/ops/taylor_features.h"

namespace annulus {
namespace {

// Forward, for one token.
struct Forward {
  double causal = 0, full = 0;
  Forward& operator+=(const Forward& other) {
    causal += other.causal, full += other.full;
    return *this;
  }
};

// Scores and sums of values: `columns` of queries and keys, and of values, of all heads.
Forward Core(int64_t columns, int64_t window, int64_t length) {
  const int64_t full = window > 0 ? std::min(window, length) : length;
  const double per_key = 2.0 * static_cast<double>(columns);
  return {per_key * MeanVisibleKeys(length, window), per_key * static_cast<double>(full)};
}

// The scan in chunks: of each token the update and the reading of a state, and the mean of half a chunk of
// scores and sums. `keys`: columns of b or c of all groups; `heads` states of state x values.
Forward Scan(int64_t keys, int64_t heads, int64_t state, int64_t values, int64_t chunk) {
  const double flops = 4.0 * static_cast<double>(heads * state * values) +
                       static_cast<double>(chunk) * static_cast<double>(keys + heads * values);
  return {flops, flops};
}

// All but products with parameters.
Forward Mixing(const ModelSpec& spec, const BranchSpec& branch, int64_t length) {
  switch (branch.kind) {
    case BranchKind::kAttention:
      return Core(2 * spec.heads * spec.head_dim, branch.window, length);
    case BranchKind::kLatentAttention: {
      const LatentSpec& latent = spec.latent;
      const int64_t columns = latent.heads * (latent.nope_dim + latent.rope_dim + latent.v_dim);
      return Core(branch.latent_groups * columns, branch.window, length);
    }
    case BranchKind::kMamba: {
      const MambaSpec& mamba = spec.mamba;
      return Scan(mamba.groups * mamba.state, mamba.heads, mamba.state, mamba.head_dim, mamba.chunk);
    }
    case BranchKind::kLightning: {
      const LinearSpec& linear = spec.lightning;
      return Scan(linear.heads * linear.key_dim, linear.heads, linear.key_dim, linear.value_dim,
                  linear.chunk);
    }
    case BranchKind::kBased: {
      // The normaliser is one more column of values.
      const LinearSpec& linear = spec.based;
      const int64_t features = TaylorFeatures(linear.key_dim);
      return Scan(linear.heads * features, linear.heads, features, linear.value_dim + 1, linear.chunk);
    }
    case BranchKind::kDeltaNet: {
      // Token by token: what the state says of the key, its correction, and what it says of the query.
      const LinearSpec& linear = spec.delta;
      const double flops = 6.0 * static_cast<double>(linear.heads * linear.key_dim * linear.value_dim);
      return {flops, flops};
    }
    case BranchKind::kMlp:
      return {};
  }
  return {};
}

// Elements of matrices by ParamPrefix; "" those at the ends that a product uses.
std::map<std::string, double> MatrixElements(const ModelSpec& spec) {
  std::map<std::string, double> elements;
  for (const ParamInfo& info : BuildParamTable(spec).params) {
    if (info.logical.rank() != 2) continue;
    size_t end = 0;
    for (int dots = 0; dots < 3 && end != std::string::npos; ++dots) end = info.name.find('.', end + 1);
    const bool in_branch = end != std::string::npos;
    const bool lookup_only = info.name == "meta.weight" || (info.name == "embed.weight" && !spec.tied_head);
    if (!in_branch && lookup_only) continue;
    elements[in_branch ? info.name.substr(0, end + 1) : ""] += static_cast<double>(info.logical.elements());
  }
  return elements;
}

}  // namespace

double MeanVisibleKeys(int64_t seq_len, int64_t window) {
  const double s = static_cast<double>(seq_len);
  const double w = window > 0 ? std::min<double>(static_cast<double>(window), s) : s;
  // Positions below w see p + 1 keys, the others w.
  return (w * (w + 1) / 2 + (s - w) * w) / s;
}

FlopsPerToken TrainingFlops(const ModelSpec& spec, int64_t seq_len) {
  const std::map<std::string, double> matrices = MatrixElements(spec);
  const int64_t length = seq_len + spec.meta_tokens;
  Forward layers;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (size_t b = 0; b < spec.layers[i].branches.size(); ++b) {
      const double products = 2 * matrices.at(ParamPrefix(spec, i, b));
      layers += {products, products};
      layers += Mixing(spec, spec.layers[i].branches[b], length);
    }
  }
  // Meta tokens pass through the layers and are not counted as tokens.
  const double passed = static_cast<double>(length) / static_cast<double>(seq_len);
  const double head = 2 * matrices.at("");
  return {3 * (layers.causal * passed + head), 3 * (layers.full * passed + head)};
}

}  // namespace annulus
