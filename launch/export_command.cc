// `annulus export`: a checkpoint as a folder of Hugging Face's Transformers.

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "annulus/base/file.h"
#include "annulus/train/hugging_face.h"
#include "commands.h"
#include "loaded_model.h"

namespace annulus {
namespace {

constexpr int64_t kProbeTokens = 32;

absl::StatusOr<DType> DTypeFrom(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    if (Name(dtype) == name) return dtype;
  }
  return Invalid("--dtype=", name, ": expected f32, bf16 or f64");
}

// What this program computes from the model, for a comparison with other programs.
absl::Status WriteProbe(const LoadedModel& model, DType exported, const std::string& path) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < kProbeTokens; ++i) {
    tokens.push_back(static_cast<int32_t>((7 * i + 3 * i * i) % model.spec().vocab_size));
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<double> logits, LogitsOf(model.spec(), *model.params, tokens));
  // Sums of thousands of rounded terms; bf16 weights keep 8 bits of each.
  const DType compute = model.params->dtype();
  const double tolerance = exported == DType::kBF16 ? 0.05 : compute == DType::kF64 ? 1e-6 : 1e-4;
  nlohmann::json rows = nlohmann::json::array();
  const auto vocabulary = static_cast<ptrdiff_t>(model.spec().vocab_size);
  for (auto row = logits.begin(); row != logits.end(); row += vocabulary) {
    rows.push_back(std::vector<double>(row, row + vocabulary));
  }
  const nlohmann::json probe = {
      {"tokens", tokens}, {"logits", rows}, {"dtype", std::string(Name(compute))}, {"tolerance", tolerance}};
  return WriteFileAtomically(path, probe.dump() + "\n");
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (!IsFirstRank()) return absl::OkStatus();
  if (const std::string to = arguments.Last("--to", "hf"); to != "hf") {
    return Invalid("--to=", to, ": expected hf");
  }
  const std::string out = arguments.Last("--out", "");
  if (out.empty()) return Invalid("--out: expected DIR");
  if (std::error_code error; std::filesystem::exists(out, error) && !std::filesystem::is_empty(out, error)) {
    return Invalid("--out=", out, ": holds files already; expected a new or an empty directory");
  }
  ANNULUS_ASSIGN_OR_RETURN(const DType dtype, DTypeFrom(arguments.Last("--dtype", "f32")));
  ANNULUS_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(arguments));
  const ModelSpec& spec = model.spec();
  ANNULUS_ASSIGN_OR_RETURN(const std::string architecture, HfArchitecture(spec));
  ANNULUS_RETURN_IF_ERROR(
      ExportHuggingFace(spec, model.finder(),
                        {.directory = out, .dtype = dtype, .max_length = model.config.spec.data.seq_len}));
  if (arguments.Has("--probe")) ANNULUS_RETURN_IF_ERROR(WriteProbe(model, dtype, out + "/probe.json"));
  std::printf("%s, step %lld, as %s in %s: %s\n", model.path.c_str(), static_cast<long long>(model.step),
              std::string(Name(dtype)).c_str(), out.c_str(), architecture.c_str());
  return absl::OkStatus();
}

}  // namespace

Command ExportCommand() {
  return {
      {"export",
       "CONFIG",
       "writes a checkpoint as a folder of Hugging Face's Transformers",
       {{"--checkpoint", Option::Takes::kValue, "DIR", "a run directory, its ckpt, or one step in it"},
        {"--to", Option::Takes::kValue, "FORMAT", "hf (default)"},
        {"--out", Option::Takes::kValue, "DIR", "the folder"},
        {"--dtype", Option::Takes::kValue, "DTYPE", "of the weights: f32 (default), bf16 or f64"},
        {"--probe", Option::Takes::kNothing, "", "adds probe.json: logits of a few tokens, to compare with"},
        {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"}}},
      Run};
}

}  // namespace annulus
