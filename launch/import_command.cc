// `annulus import`: a folder of Hugging Face's Transformers as a configuration and a run directory with its
// checkpoint of step 0.

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/train/hugging_face.h"
#include "commands.h"
#include "loaded_model.h"
#include "model_checkpoint.h"

namespace annulus {
namespace {

constexpr int64_t kLongestSequence = 4096;  // to start with; longer ones are a matter of the configuration

// Everything of a run but its model, to be changed by hand or with --set.
std::string RestOfRun(const HfFolder& folder) {
  const bool bytes = folder.spec().vocab_size == 256;
  const char* source = bytes ? "text { path: \"train.txt\" }" : "megatron { prefix: \"train\" }";
  return absl::StrCat("data {\n  train { ", source, " }\n  validation_fraction: 0.05\n  seq_len: ",
                      std::min(folder.max_length(), kLongestSequence), "\n}\n",
                      "optim {\n  adamw { lr: 1e-4 }\n  steps: 1000\n  sequences_per_step: 8\n}\n");
}

absl::StatusOr<ResolvedConfig> ConfigFor(const HfFolder& folder, const Arguments& arguments) {
  std::vector<std::string> overrides = arguments.All("--set");
  const std::string like = arguments.Last("--like", "");
  if (!like.empty()) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(like));
    overrides.insert(overrides.begin(), ModelOverride(folder.spec()));
    return LoadConfig(like, text, overrides);
  }
  const std::string text =
      absl::StrCat("name: \"imported\"\nseed: 1\n", ModelText(folder.spec()), RestOfRun(folder));
  const absl::StatusOr<ResolvedConfig> config = LoadConfig("config.textproto", text, overrides);
  if (!config.ok()) return Prefixed(config.status(), "made from " + arguments.operand() + "/config.json: ");
  return config;
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (!IsFirstRank()) return absl::OkStatus();
  if (const std::string from = arguments.Last("--from", "hf"); from != "hf") {
    return Invalid("--from=", from, ": expected hf");
  }
  const std::string out = arguments.Last("--out", "");
  if (out.empty()) return Invalid("--out: expected DIR");
  ANNULUS_ASSIGN_OR_RETURN(const HfFolder folder, HfFolder::Open(arguments.operand()));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig config, ConfigFor(folder, arguments));
  const DType dtype = config.spec.compute == ComputeType::kF64 ? DType::kF64 : DType::kF32;
  const ParamTable table = BuildParamTable(config.spec.model);
  std::vector<Tensor> memory;
  std::vector<NamedTensor> parameters;
  for (const ParamInfo& info : table.params) {
    ANNULUS_ASSIGN_OR_RETURN(Tensor value, folder.Read(info, dtype));
    memory.push_back(std::move(value));
    parameters.push_back({info.name, memory.back().ref()});
  }
  ANNULUS_RETURN_IF_ERROR(SaveModel(out, config, parameters));
  std::printf(
      "%s, a %s, as %s/config.textproto and %s/ckpt\n"
      "annulus sample %s --prompt TEXT continues a text with it; annulus train %s/config.textproto "
      "--run_dir %s --resume trains it further\n",
      arguments.operand().c_str(), folder.architecture().c_str(), out.c_str(), out.c_str(), out.c_str(),
      out.c_str(), out.c_str());
  return absl::OkStatus();
}

}  // namespace

Command ImportCommand() {
  return {
      {"import",
       "DIR",
       "makes a configuration and a checkpoint from a folder of Hugging Face's Transformers",
       {{"--from", Option::Takes::kValue, "FORMAT", "hf (default)"},
        {"--out", Option::Takes::kValue, "DIR", "a new run directory, and config.textproto in it"},
        {"--like", Option::Takes::kValue, "CONFIG", "takes everything but the model from this configuration"},
        {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"}}},
      Run};
}

}  // namespace annulus
