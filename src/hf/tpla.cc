#include "annulus/train/tpla.h"

#include <bit>
#include <cmath>
#include <numeric>
#include <set>

#include "annulus/base/random.h"
#include "layer_inputs.h"

namespace annulus {
namespace {

constexpr double kLatentEps = 1e-6;  // as in MLA
// Of a sequence so many queries, spread evenly, say how keys are scaled.
constexpr int64_t kMostQueries = 64;

// A layer of latent attention in doubles.
struct Layer {
  Dense kv_down, kv_up;      // [r, d]; [heads (nope + v), r]
  std::vector<double> gain;  // [r]
  Dense q_down, q_up;        // q_down of no rows: not compressed
  std::vector<double> q_gain;
};

Dense Read(const ParamStore& params, const std::string& name) {
  const TensorRef value = params.Value(params.table().IndexOf(name));
  Dense matrix = Dense::Zeros(value.dim(0), value.rank() == 1 ? 1 : value.dim(1));
  VisitFloat(value.dtype(),
             [&]<class T>() { std::copy_n(value.data<T>(), value.elements(), matrix.values.begin()); });
  return matrix;
}

void Assign(const Dense& matrix, const std::string& name, ParamStore& params) {
  const TensorRef value = params.Value(params.table().IndexOf(name));
  ANNULUS_CHECK(value.elements() == matrix.rows * matrix.columns) << name;
  VisitFloat(value.dtype(), [&]<class T>() {
    for (int64_t i = 0; i < value.elements(); ++i) {
      value.data<T>()[i] = static_cast<T>(matrix.values[static_cast<size_t>(i)]);
    }
  });
}

Layer ReadLayer(const ModelSpec& spec, const ParamStore& params, const std::string& prefix) {
  Layer layer{.kv_down = Read(params, prefix + "kv_down.weight"),
              .kv_up = Read(params, prefix + "kv_up.0.weight"),
              .gain = Read(params, prefix + "kv_norm.weight").values,
              .q_down = {},
              .q_up = Read(params, prefix + "q_up.weight"),
              .q_gain = {}};
  if (spec.latent.q_rank > 0) {
    layer.q_down = Read(params, prefix + "q_down.weight");
    layer.q_gain = Read(params, prefix + "q_norm.weight").values;
  }
  return layer;
}

double Rms(const double* x, int64_t n) {
  return std::sqrt(std::inner_product(x, x + n, x, 0.0) / static_cast<double>(n) + kLatentEps);
}

// Rows divided by their RMS.
Dense Normed(Dense x) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const double rms = Rms(x.row(t), x.columns);
    for (int64_t c = 0; c < x.columns; ++c) x(t, c) /= rms;
  }
  return x;
}

// Sylvester's matrix with signs of the latent's columns, over sqrt(r): orthogonal.
Dense Hadamard(int64_t r, const RandomStream& signs) {
  Dense u = Dense::Zeros(r, r);
  const double size = 1 / std::sqrt(static_cast<double>(r));
  for (int64_t i = 0; i < r; ++i) {
    const double sign = signs.Below(static_cast<uint64_t>(i), 2) == 0 ? 1 : -1;
    for (int64_t j = 0; j < r; ++j) {
      u(i, j) = std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0 ? sign * size : -sign * size;
    }
  }
  return u;
}

// What a layer sees of a sequence.
struct Seen {
  Dense x;                     // normed input, [tokens, d_model]
  std::vector<KeyRange> keys;  // of each token's query
};

class LayerConversion {
 public:
  LayerConversion(const ModelSpec& spec, const TplaOptions& options, Layer layer, std::vector<Seen> inputs)
      : latent_(spec.latent),
        options_(options),
        width_(spec.latent.kv_rank / options.groups),
        layer_(std::move(layer)),
        inputs_(std::move(inputs)) {}

  void Run(const RandomStream& signs) {
    for (int64_t row = 0; row < layer_.kv_up.rows; ++row) {
      for (int64_t c = 0; c < latent_.kv_rank; ++c) {
        layer_.kv_up(row, c) *= layer_.gain[static_cast<size_t>(c)];
      }
    }
    if (options_.transform != LatentTransform::kNone) {
      const Dense u = options_.transform == LatentTransform::kHadamard ? Hadamard(latent_.kv_rank, signs)
                                                                       : Eigenvectors(SecondMoments());
      layer_.kv_down = Times(Transposed(u), layer_.kv_down);
      layer_.kv_up = Times(layer_.kv_up, u);
    }
    if (options_.groups == 1) return;  // exact as it is
    const bool scaled = options_.transform != LatentTransform::kNone;
    unscaled_ = layer_.kv_up;
    if (scaled) ScaleParts();
    if (scaled) ScaleKeys();
    ScaleRows(latent_.nope_dim, latent_.v_dim, [&](int64_t, int64_t) { return options_.groups; });
  }

  void Store(const std::string& prefix, ParamStore& params) const {
    Assign(layer_.kv_down, prefix + "kv_down.weight", params);
    Assign({latent_.kv_rank, 1, std::vector<double>(static_cast<size_t>(latent_.kv_rank), 1.0)},
          prefix + "kv_norm.weight", params);
    for (int64_t b = 0; b < options_.groups; ++b) {
      Dense part = Dense::Zeros(layer_.kv_up.rows, width_);
      for (int64_t row = 0; row < part.rows; ++row) {
        std::copy_n(layer_.kv_up.row(row) + b * width_, width_, part.row(row));
      }
      Assign(part, absl::StrCat(prefix, "kv_up.", b, ".weight"), params);
    }
  }

 private:
  Dense Latents(const Dense& inputs) const { return TimesTransposed(inputs, layer_.kv_down); }

  Dense SecondMoments() const {
    Dense moments = Dense::Zeros(latent_.kv_rank, latent_.kv_rank);
    for (const Seen& inputs : inputs_) {
      const Dense columns = Transposed(Normed(Latents(inputs.x)));
      const Dense of_sequence = TimesTransposed(columns, columns);
      for (size_t i = 0; i < moments.values.size(); ++i) moments.values[i] += of_sequence.values[i];
    }
    return moments;
  }

  // Rows [begin, begin + count) of each head times factor(head, part).
  template <typename Fn>
  void ScaleRows(int64_t begin, int64_t count, Fn&& factor) {
    const int64_t of_head = latent_.nope_dim + latent_.v_dim;
    for (int64_t row = 0; row < layer_.kv_up.rows; ++row) {
      const int64_t within = row % of_head - begin;
      if (within < 0 || within >= count) continue;
      for (int64_t c = 0; c < latent_.kv_rank; ++c) {
        layer_.kv_up(row, c) *= static_cast<double>(factor(row / of_head, c / width_));
      }
    }
  }

  // The factor for which a normed part is closest to that part of the normed whole.
  void ScaleParts() {
    std::vector<double> sums(static_cast<size_t>(options_.groups));
    double tokens = 0;
    for (const Seen& inputs : inputs_) {
      const Dense latents = Latents(inputs.x);
      for (int64_t t = 0; t < latents.rows; ++t) {
        const double whole = Rms(latents.row(t), latent_.kv_rank);
        for (int64_t b = 0; b < options_.groups; ++b) {
          sums[static_cast<size_t>(b)] += Rms(latents.row(t) + b * width_, width_) / whole;
        }
      }
      tokens += static_cast<double>(latents.rows);
    }
    ScaleRows(0, latent_.nope_dim + latent_.v_dim,
              [&](int64_t, int64_t b) { return sums[static_cast<size_t>(b)] / tokens; });
  }

  // Queries [tokens, heads (nope + rope)].
  Dense Queries(const Dense& inputs) const {
    if (layer_.q_down.rows == 0) return TimesTransposed(inputs, layer_.q_up);
    Dense compressed = Normed(TimesTransposed(inputs, layer_.q_down));
    for (int64_t t = 0; t < compressed.rows; ++t) {
      for (int64_t c = 0; c < compressed.columns; ++c) {
        compressed(t, c) *= layer_.q_gain[static_cast<size_t>(c)];
      }
    }
    return TimesTransposed(compressed, layer_.q_up);
  }

  // By head and part the factor for which the part's scores are closest to the whole ones, by least squares
  // over the keys of each query; what all keys of a query share counts for nothing in a softmax.
  void ScaleKeys() {
    const int64_t parts = options_.groups;
    Dense with = Dense::Zeros(latent_.heads, parts), own = with;
    for (const Seen& inputs : inputs_) {
      const Dense latents = Latents(inputs.x), queries = Queries(inputs.x);
      Dense keys = latents;  // each part normed alone
      const Dense whole = Normed(latents);
      for (int64_t t = 0; t < keys.rows; ++t) {
        for (int64_t b = 0; b < parts; ++b) {
          const double rms = Rms(latents.row(t) + b * width_, width_);
          for (int64_t c = b * width_; c < (b + 1) * width_; ++c) keys(t, c) /= rms;
        }
      }
      const Scored scored{queries, whole, keys, inputs.keys};
      const int64_t stride = std::max<int64_t>(1, latents.rows / kMostQueries);
      for (int64_t t = stride; t < latents.rows; t += stride) {
        for (int64_t h = 0; h < latent_.heads; ++h) AddScores(scored, t, h, &with, &own);
      }
    }
    ScaleRows(0, latent_.nope_dim,
              [&](int64_t h, int64_t b) { return own(h, b) > 0 ? with(h, b) / own(h, b) : 1.0; });
  }

  struct Scored {
    const Dense &queries, &whole, &keys;
    const std::vector<KeyRange>& visible;
  };
  void AddScores(const Scored& of, int64_t t, int64_t h, Dense* with, Dense* own) const {
    const int64_t parts = options_.groups, r = latent_.kv_rank;
    const double* q = of.queries.row(t) + h * (latent_.nope_dim + latent_.rope_dim);
    std::vector<double> scaled(static_cast<size_t>(r)), plain(static_cast<size_t>(r));
    for (int64_t i = 0; i < latent_.nope_dim; ++i) {
      const double* up = layer_.kv_up.row(h * (latent_.nope_dim + latent_.v_dim) + i);
      const double* unscaled = unscaled_.row(h * (latent_.nope_dim + latent_.v_dim) + i);
      for (int64_t c = 0; c < r; ++c) {
        scaled[static_cast<size_t>(c)] += q[i] * up[c];
        plain[static_cast<size_t>(c)] += q[i] * unscaled[c];
      }
    }
    const KeyRange visible = of.visible[static_cast<size_t>(t)];
    const int64_t keys = visible.hi - visible.lo;
    Dense scores = Dense::Zeros(parts + 1, keys);  // of each part, and the whole
    for (int64_t k = 0; k < keys; ++k) {
      const double *own_key = of.keys.row(visible.lo + k), *whole_key = of.whole.row(visible.lo + k);
      for (int64_t b = 0; b < parts; ++b) {
        scores(b, k) = std::inner_product(own_key + b * width_, own_key + (b + 1) * width_,
                                          scaled.begin() + b * width_, 0.0);
      }
      scores(parts, k) = std::inner_product(whole_key, whole_key + r, plain.begin(), 0.0);
    }
    for (int64_t row = 0; row <= parts; ++row) {
      const double mean =
          std::accumulate(scores.row(row), scores.row(row) + keys, 0.0) / static_cast<double>(keys);
      for (int64_t k = 0; k < keys; ++k) scores(row, k) -= mean;
    }
    for (int64_t b = 0; b < parts; ++b) {
      (*with)(h, b) += std::inner_product(scores.row(b), scores.row(b) + keys, scores.row(parts), 0.0);
      (*own)(h, b) += std::inner_product(scores.row(b), scores.row(b) + keys, scores.row(b), 0.0);
    }
  }

  LatentSpec latent_;
  TplaOptions options_;
  int64_t width_;  // of a part
  Layer layer_;
  Dense unscaled_;  // kv_up, before parts were scaled
  std::vector<Seen> inputs_;
};

// What a branch of the layer that `inputs` have advanced to sees.
absl::StatusOr<std::vector<Seen>> SeenBy(const BranchSpec& branch, LayerInputs& inputs) {
  std::vector<Seen> all;
  for (size_t i = 0; i < inputs.size(); ++i) {
    Seen& seen = all.emplace_back();
    ANNULUS_ASSIGN_OR_RETURN(seen.x, inputs.Of(i));
    for (int64_t t = 0; t < seen.x.rows; ++t) {
      seen.keys.push_back(VisibleKeys(inputs.Masks(i), branch.window, 0, t));
    }
  }
  return all;
}

}  // namespace

absl::StatusOr<ModelSpec> TplaSpec(const ModelSpec& spec, const TplaOptions& options) {
  if (!Uses(spec, BranchKind::kLatentAttention)) {
    return Invalid("model.pattern: no layer has latent attention (T); there is nothing to convert");
  }
  const int64_t rank = spec.latent.kv_rank;
  if (options.groups < 1 || rank % options.groups != 0) {
    return Invalid("--groups=", options.groups, ": expected a divisor of model.latent.kv_rank=", rank);
  }
  if (options.transform == LatentTransform::kHadamard && (rank & (rank - 1)) != 0) {
    return Invalid("--transform=hadamard: expected a power of two for model.latent.kv_rank=", rank,
                   "; pca takes any");
  }
  ModelSpec converted = spec;
  for (LayerSpec& layer : converted.layers) {
    for (BranchSpec& branch : layer.branches) {
      if (branch.kind != BranchKind::kLatentAttention) continue;
      if (branch.latent_groups != 1) {
        return Invalid("model.pattern: g=", branch.latent_groups,
                       ": expected g=1 in every layer of latent attention");
      }
      branch.latent_groups = options.groups;
    }
  }
  return converted;
}

absl::StatusOr<std::unique_ptr<ParamStore>> ConvertToTpla(const ModelSpec& spec, const ParamStore& params,
                                                          const TplaOptions& options,
                                                          const std::vector<CalibrationSequence>& sequences) {
  ANNULUS_ASSIGN_OR_RETURN(const ModelSpec converted, TplaSpec(spec, options));
  auto result = std::make_unique<ParamStore>(Device{}, params.dtype(), BuildParamTable(converted), 1);
  for (const ParamInfo& info : result->table().params) {
    const bool split = info.name.find(".latent.kv_up.") != std::string::npos;
    if (!split) Assign(Read(params, info.name), info.name, *result);
  }
  LayerInputs inputs(spec, params);
  const bool calibrated = options.transform != LatentTransform::kNone;
  for (size_t s = 0; calibrated && s < sequences.size(); ++s) {
    ANNULUS_RETURN_IF_ERROR(inputs.Add(sequences[s]));
  }
  std::set<std::string> done;  // tied layers have one set of parameters
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (size_t b = 0; b < spec.layers[i].branches.size(); ++b) {
      const BranchSpec& branch = spec.layers[i].branches[b];
      const std::string prefix = ParamPrefix(spec, i, b);
      if (branch.kind != BranchKind::kLatentAttention || !done.insert(prefix).second) continue;
      ANNULUS_RETURN_IF_ERROR(inputs.AdvanceTo(i));
      ANNULUS_ASSIGN_OR_RETURN(std::vector<Seen> seen, SeenBy(branch, inputs));
      LayerConversion conversion(spec, options, ReadLayer(spec, params, prefix), std::move(seen));
      conversion.Run(RandomStream(options.seed, "tpla/" + prefix));
      conversion.Store(prefix, *result);
    }
  }
  return result;
}

}  // namespace annulus
