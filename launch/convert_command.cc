// `annulus convert`: a trained model in another form. So far latent attention as tensor-parallel latent
// attention.

#include <cmath>
#include <cstdio>

#include "annulus/train/hugging_face.h"
#include "annulus/train/tpla.h"
#include "commands.h"
#include "loaded_model.h"
#include "model_checkpoint.h"

namespace annulus {
namespace {

constexpr int64_t kCalibrationSequences = 8;
constexpr int64_t kMeasuredSequences = 16;

absl::StatusOr<LatentTransform> TransformFrom(const std::string& name) {
  if (name == "hadamard") return LatentTransform::kHadamard;
  if (name == "pca") return LatentTransform::kPca;
  return Invalid("--transform=", name, ": expected hadamard or pca");
}

struct Data {
  std::vector<CalibrationSequence> calibration;  // of the training split
  std::vector<Sequence> measured;                // of the validation split
};

absl::StatusOr<Data> ReadData(const RunSpec& spec, int64_t sequences) {
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<DataSet> set,
                           DataSet::Open(spec.data, spec.seed, spec.model.vocab_size));
  Data data;
  for (int64_t i = 0; i < sequences; ++i) {
    ANNULUS_ASSIGN_OR_RETURN(Sequence sequence, set->Train(i));
    const auto length = static_cast<size_t>(sequence.length);
    CalibrationSequence& to = data.calibration.emplace_back();
    to.tokens = std::move(sequence.tokens);
    to.tokens.resize(length);
    if (!spec.data.document_mask) continue;
    to.document_starts = std::move(sequence.document_starts);
    to.document_starts.resize(length);
  }
  const int64_t measured = std::min(kMeasuredSequences, set->validation_sequences());
  if (measured == 0) return Invalid("data: expected a validation split to measure perplexity on");
  for (int64_t i = 0; i < measured; ++i) {
    ANNULUS_ASSIGN_OR_RETURN(data.measured.emplace_back(), set->Validation(i));
  }
  return data;
}

absl::StatusOr<double> Perplexity(const RunSpec& run, const ModelSpec& spec, const ParamStore& params,
                                  const Data& data) {
  ANNULUS_ASSIGN_OR_RETURN(const double loss, MeanLossOf(run, spec, params, data.measured));
  return std::exp(loss);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (!IsFirstRank()) return absl::OkStatus();
  if (const std::string to = arguments.Last("--to", "tpla"); to != "tpla") {
    return Invalid("--to=", to, ": expected tpla");
  }
  const std::string out = arguments.Last("--out", "");
  if (out.empty()) return Invalid("--out: expected DIR");
  TplaOptions options;
  ANNULUS_ASSIGN_OR_RETURN(options.groups, arguments.PositiveInt("--groups", 2));
  ANNULUS_ASSIGN_OR_RETURN(options.transform, TransformFrom(arguments.Last("--transform", "pca")));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t calibration,
                           arguments.PositiveInt("--calibration", kCalibrationSequences));
  ANNULUS_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(arguments));
  const RunSpec& run = model.config.spec;
  options.seed = run.seed;
  ANNULUS_ASSIGN_OR_RETURN(const ModelSpec spec, TplaSpec(run.model, options));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig config, LoadConfig("the configuration converted",
                                                                   model.config.text, {ModelOverride(spec)}));
  ANNULUS_ASSIGN_OR_RETURN(const Data data, ReadData(run, calibration));
  ANNULUS_ASSIGN_OR_RETURN(const auto converted,
                           ConvertToTpla(run.model, *model.params, options, data.calibration));
  TplaOptions plain = options;
  plain.transform = LatentTransform::kNone;
  ANNULUS_ASSIGN_OR_RETURN(const auto naive,
                           ConvertToTpla(run.model, *model.params, plain, data.calibration));
  ANNULUS_ASSIGN_OR_RETURN(const double before, Perplexity(run, run.model, *model.params, data));
  ANNULUS_ASSIGN_OR_RETURN(const double after, Perplexity(run, spec, *converted, data));
  ANNULUS_ASSIGN_OR_RETURN(const double sliced, Perplexity(run, spec, *naive, data));

  std::vector<NamedTensor> parameters;
  for (size_t i = 0; i < converted->table().params.size(); ++i) {
    parameters.push_back({converted->table().params[i].name, converted->Value(static_cast<int>(i))});
  }
  ANNULUS_RETURN_IF_ERROR(SaveModel(out, config, std::move(parameters)));
  std::printf(
      "perplexity of %zu validation sequences: %.4f before, %.4f with g=%lld (%s), %.4f if the latent is "
      "sliced as it stands\n%s/config.textproto and %s/ckpt hold the converted model\n",
      data.measured.size(), before, after, static_cast<long long>(options.groups),
      arguments.Last("--transform", "pca").c_str(), sliced, out.c_str(), out.c_str());
  return absl::OkStatus();
}

}  // namespace

Command ConvertCommand() {
  return {{"convert",
           "CONFIG",
           "makes tensor-parallel latent attention (TPLA) of a model with latent attention (MLA)",
           {{"--checkpoint", Option::Takes::kValue, "DIR", "a run directory, its ckpt, or one step in it"},
            {"--to", Option::Takes::kValue, "FORM", "tpla (default)"},
            {"--groups", Option::Takes::kValue, "G", "branches of the latent (default 2)"},
            {"--transform", Option::Takes::kValue, "NAME", "of the latent: pca (default) or hadamard"},
            {"--calibration", Option::Takes::kValue, "N", "training sequences to calibrate with (default 8)"},
            {"--out", Option::Takes::kValue, "DIR", "a new run directory, and config.textproto in it"},
            {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"}}},
          Run};
}

}  // namespace annulus
