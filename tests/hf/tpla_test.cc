// Latent attention converted to tensor-parallel latent attention: what is exact is so, and what is an
// approximation is closer than slicing the latent as it stands.

#include "annulus/train/tpla.h"

#include "../../src/hf/dense.h"
#include "model/named_specs.h"

namespace annulus::testing {
namespace {

ModelSpec LatentSpecOf(const std::string& text, int64_t kv_rank = 8, int64_t q_rank = 10) {
  ModelSpec spec = WithStates(2, 3, SmallSpec({}));
  spec.latent = {.heads = 2, .q_rank = q_rank, .kv_rank = kv_rank, .nope_dim = 6, .rope_dim = 4, .v_dim = 5};
  Pattern pattern = ParsePattern(text, {}).value();
  spec.layers = std::move(pattern.layers), spec.meta_tokens = pattern.meta_tokens;
  return spec;
}

std::vector<CalibrationSequence> Sequences(const ModelSpec& spec) {
  std::vector<CalibrationSequence> sequences;
  for (std::vector<int32_t>& tokens : RandomBatch(spec, {.length = 33, .batch = 3}).tokens) {
    sequences.push_back({.tokens = std::move(tokens)});
  }
  return sequences;
}

std::vector<double> LogitsWith(const ModelSpec& spec, const ParamStore& params) {
  MeshRun run;
  run.fill = [&](ParamStore& to) {
    for (int bucket = 0; bucket < to.buckets(); ++bucket) {
      const TensorRef values = to.BucketValues(bucket);
      std::memcpy(values.raw(), params.BucketValues(bucket).raw(), static_cast<size_t>(values.bytes()));
    }
  };
  return Logits(spec, RandomBatch(spec, {.length = 29, .batch = 2}), run);
}

// A model whose parameters `change` may change before it is converted.
class Converted {
 public:
  Converted(const ModelSpec& spec, const std::function<void(ParamStore&)>& change) : spec_(spec) {
    FillRandom(params_);
    change(params_);
  }
  // Largest difference of logits relative to the largest.
  double Error(const TplaOptions& options) const {
    const ModelSpec converted = TplaSpec(spec_, options).value();
    const auto params = ConvertToTpla(spec_, params_, options, Sequences(spec_));
    ANNULUS_CHECK(params.ok()) << params.status();
    return RelativeDifference(LogitsWith(converted, **params), LogitsWith(spec_, params_));
  }

 private:
  ModelSpec spec_;
  ParamStore params_{Device{}, DType::kF64, BuildParamTable(spec_), 1};
};

// Rows of a matrix of every layer of latent attention, times factor(row).
template <typename Fn>
void ScaleRows(ParamStore& params, const std::string& suffix, Fn&& factor) {
  for (size_t i = 0; i < params.table().params.size(); ++i) {
    const std::string& name = params.table().params[i].name;
    if (name.find(suffix) == std::string::npos) continue;
    const TensorRef value = params.Value(static_cast<int>(i));
    const int64_t columns = value.elements() / value.dim(0);
    for (int64_t j = 0; j < value.elements(); ++j) value.data<double>()[j] *= factor(j / columns);
  }
}

TEST(TplaTest, OneBranchIsTheSameModel) {
  for (const std::string pattern : {"(T -)^2 A", "L T{w=5} - M T", "meta=3 A T A{kv=@-2} T"}) {
    for (const int64_t q_rank : {0, 10}) {
      const Converted model(LatentSpecOf(pattern, 8, q_rank), [](ParamStore&) {});
      for (const LatentTransform transform :
           {LatentTransform::kNone, LatentTransform::kHadamard, LatentTransform::kPca}) {
        EXPECT_LE(model.Error({.groups = 1, .transform = transform, .seed = 3}), 1e-12) << pattern;
      }
    }
  }
}

// Parameters of a random model converted with these sequences.
std::unique_ptr<ParamStore> ConvertedWith(const ModelSpec& spec,
                                          const std::vector<CalibrationSequence>& sequences) {
  ParamStore params(Device{}, DType::kF64, BuildParamTable(spec), 1);
  FillRandom(params);
  return ConvertToTpla(spec, params, {.groups = 2}, sequences).value();
}

// Of all parameters, relative to the largest of each.
double Distance(const ParamStore& got, const ParamStore& want) {
  double worst = 0;
  for (size_t i = 0; i < want.table().params.size(); ++i) {
    const TensorRef a = got.Value(static_cast<int>(i)), b = want.Value(static_cast<int>(i));
    const auto values = [](TensorRef t) {
      return std::vector<double>(t.data<double>(), t.data<double>() + t.elements());
    };
    worst = std::max(worst, RelativeDifference(values(a), values(b)));
  }
  return worst;
}

TEST(TplaTest, DocumentsAreCalibratedWithAsSequencesOfTheirOwn) {
  const ModelSpec spec = LatentSpecOf("T - M T{w=6} L T");
  CalibrationSequence together, unmasked;
  std::vector<CalibrationSequence> apart(3);
  const std::vector<int32_t> tokens = Sequences(spec)[0].tokens;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const size_t document = i < 7 ? 0 : i < 20 ? 1 : 2;
    apart[document].tokens.push_back(tokens[i]);
    together.document_starts.push_back(document == 0 ? 0 : document == 1 ? 7 : 20);
  }
  together.tokens = unmasked.tokens = tokens;
  const auto want = ConvertedWith(spec, apart);
  EXPECT_LE(Distance(*ConvertedWith(spec, {together}), *want), 1e-9);
  EXPECT_GT(Distance(*ConvertedWith(spec, {unmasked}), *want), 1e-3);
}

// A query that sees one key has nothing to weigh keys by: they are scaled as values are, but for the factor
// that makes a mean of the parts' sum.
TEST(TplaTest, KeysThatAWindowHidesCountForNothing) {
  const auto difference_of_rows = [](const std::string& pattern) {
    const ModelSpec spec = LatentSpecOf(pattern);
    ParamStore params(Device{}, DType::kF64, BuildParamTable(spec), 1);
    FillRandom(params);
    const auto up = [&](const ParamStore& of, const std::string& part) {
      return of.Value(of.table().IndexOf(absl::StrCat("layers.0.latent.kv_up.", part, ".weight")));
    };
    const TensorRef all = up(params, "0");  // the first head's first key and value alike
    std::memcpy(all.Rows(spec.latent.nope_dim, spec.latent.nope_dim + 1).raw(), all.Rows(0, 1).raw(),
                static_cast<size_t>(all.dim(1)) * sizeof(double));
    const auto converted = ConvertToTpla(spec, params, {.groups = 2}, Sequences(spec)).value();
    double worst = 0;
    for (const char* part : {"0", "1"}) {
      const TensorRef rows = up(*converted, part);
      for (int64_t c = 0; c < rows.dim(1); ++c) {
        const double key = rows.data<double>()[c],
                     value = rows.data<double>()[spec.latent.nope_dim * rows.dim(1) + c];
        worst = std::max(worst, std::abs(2 * key - value) / std::abs(value));
      }
    }
    return worst;
  };
  EXPECT_LE(difference_of_rows("T{w=1}"), 1e-12);
  EXPECT_GT(difference_of_rows("T{w=2}"), 1e-3);
}

// Keys by position only, and two halves of a latent that are equal: nothing is left to approximate.
TEST(TplaTest, TheMeanOfValuesIsTheirSum) {
  const ModelSpec spec = LatentSpecOf("(T -)^2");
  const Converted model(spec, [&](ParamStore& params) {
    const int64_t of_head = spec.latent.nope_dim + spec.latent.v_dim;
    ScaleRows(params, "kv_up", [&](int64_t row) { return row % of_head < spec.latent.nope_dim ? 0.0 : 1.0; });
    for (size_t i = 0; i < params.table().params.size(); ++i) {
      const std::string& name = params.table().params[i].name;
      if (name.find("kv_down") == std::string::npos) continue;
      const TensorRef rows = params.Value(static_cast<int>(i));
      std::memcpy(rows.Rows(4, 8).raw(), rows.Rows(0, 4).raw(), static_cast<size_t>(rows.bytes() / 2));
    }
  });
  EXPECT_LE(model.Error({.groups = 2, .transform = LatentTransform::kNone}), 1e-12);
  EXPECT_GT(model.Error({.groups = 4, .transform = LatentTransform::kNone}), 1e-3);
}

// Trained latents have few directions of weight. A part without any of them is blown up by its norm.
Converted WithFewDirections(int64_t directions, double keys) {
  const ModelSpec spec = LatentSpecOf("(T -)^2", 16);
  return Converted(spec, [=](ParamStore& params) {
    const int64_t of_head = spec.latent.nope_dim + spec.latent.v_dim;
    ScaleRows(params, "kv_down", [=](int64_t row) { return row < directions ? 3.0 : 0.01; });
    ScaleRows(params, "kv_up",
              [=](int64_t row) { return row % of_head < spec.latent.nope_dim ? keys : 2.0; });
  });
}

TEST(TplaTest, PrincipalDirectionsFirstAreCloserThanTheLatentSliced) {
  const Converted model = WithFewDirections(8, 2.0);  // as many as a part has columns
  const double sliced = model.Error({.groups = 2, .transform = LatentTransform::kNone});
  const double pca = model.Error({.groups = 2, .transform = LatentTransform::kPca});
  EXPECT_GT(sliced, 0.5);
  EXPECT_LE(pca, 0.02) << sliced;
}

// A Hadamard matrix makes norms of parts alike, which is all where keys are known by their position.
TEST(TplaTest, HadamardKeepsNorms) {
  const Converted model = WithFewDirections(2, 0.0);
  const double sliced = model.Error({.groups = 2, .transform = LatentTransform::kNone});
  const double hadamard = model.Error({.groups = 2, .transform = LatentTransform::kHadamard, .seed = 1});
  EXPECT_GT(sliced, 0.2);
  EXPECT_LE(hadamard, 0.02) << sliced;
}

TEST(TplaTest, RefusesWhatItCannotConvert) {
  const auto message = [](const ModelSpec& spec, const TplaOptions& options) {
    return std::string(TplaSpec(spec, options).status().message());
  };
  EXPECT_EQ(message(LatentSpecOf("A -"), {}),
            "model.pattern: no layer has latent attention (T); there is nothing to convert");
  EXPECT_EQ(message(LatentSpecOf("T{g=2} -"), {}),
            "model.pattern: g=2: expected g=1 in every layer of latent attention");
  EXPECT_EQ(message(LatentSpecOf("T -", 9), {.groups = 2}),
            "--groups=2: expected a divisor of model.latent.kv_rank=9");
  EXPECT_EQ(message(LatentSpecOf("T -", 12), {.groups = 2, .transform = LatentTransform::kHadamard}),
            "--transform=hadamard: expected a power of two for model.latent.kv_rank=12; pca takes any");
}

TEST(EigenvectorsTest, AreOrthogonalAndSorted) {
  for (const int64_t n : {1, 2, 3, 17, 40}) {
    const RandomStream random(static_cast<uint64_t>(n), "a");
    Dense a = Dense::Zeros(n, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        a(i, j) = a(j, i) =
            std::pow(10.0, static_cast<double>(i % 5) - 3) * random.Normal(static_cast<uint64_t>(i * n + j));
      }
    }
    const Dense v = Eigenvectors(a), t = Transposed(v);
    const Dense unit = Times(t, v), diagonal = Times(t, Times(a, v));
    double largest = 0;
    for (const double x : a.values) largest = std::max(largest, std::abs(x));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        EXPECT_NEAR(unit(i, j), i == j ? 1 : 0, 1e-13);
        if (i == j) continue;
        EXPECT_LE(std::abs(diagonal(i, j)), 1e-12 * largest * static_cast<double>(n));
      }
      if (i == 0) continue;
      EXPECT_GE(diagonal(i - 1, i - 1), diagonal(i, i));
    }
  }
}

}  // namespace
}  // namespace annulus::testing
