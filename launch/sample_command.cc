#include <cstdio>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "annulus/train/checkpoint.h"
#include "annulus/train/sample.h"
#include "annulus/train/trainer.h"
#include "loaded_model.h"

namespace annulus {
namespace {

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (!IsFirstRank()) return absl::OkStatus();
  if (!arguments.Has("--prompt")) return Invalid("--prompt: expected TEXT to continue");
  ANNULUS_ASSIGN_OR_RETURN(const Checkpoint checkpoint,
                           Checkpoint::Open(CheckpointPath(arguments.operand())));
  ANNULUS_ASSIGN_OR_RETURN(
      const ResolvedConfig config,
      LoadConfig(checkpoint.path() + "/manifest.json: config", checkpoint.meta().config, {}));
  const RunSpec& spec = config.spec;
  // Text comes byte by byte, which a CPU does as well.
  Context ctx{Device{}};
  const DType dtype = spec.compute == ComputeType::kF64 ? DType::kF64 : DType::kF32;
  ParamStore params(Device{}, dtype, BuildParamTable(spec.model), 1);
  const auto find = [&](absl::string_view name) { return checkpoint.Find(name); };
  ANNULUS_RETURN_IF_ERROR(Prefixed(RestoreParameters(ctx, params, find), checkpoint.path() + ": "));

  SampleSpec sample = spec.sample;
  sample.prompt = arguments.Last("--prompt", "");
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> tokens, arguments.PositiveInt("--tokens"));
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> seed, arguments.PositiveInt("--seed"));
  sample.tokens = tokens.value_or(200);
  const std::string temperature = arguments.Last("--temperature", absl::StrCat(sample.temperature));
  if (!absl::SimpleAtod(temperature, &sample.temperature) ||
      !(sample.temperature >= 0 && sample.temperature <= 100)) {
    return Invalid("--temperature=", temperature, ": expected a number from 0 to 100");
  }

  std::fputs(sample.prompt.c_str(), stdout);
  ANNULUS_RETURN_IF_ERROR(
      Sample(ctx, {.spec = spec.model, .params = params, .max_context = spec.data.seq_len}, sample,
             static_cast<uint64_t>(seed.value_or(static_cast<int64_t>(spec.seed))), [](char byte) {
               std::fputc(byte, stdout);
               std::fflush(stdout);
             }));
  std::fputs("\n", stdout);
  return absl::OkStatus();
}

}  // namespace

Command SampleCommand() {
  return {{"sample",
           "CKPT",
           "continues a text with a checkpoint (a run directory, its ckpt, or one step in it)",
           {{"--prompt", Option::Takes::kValue, "TEXT", "text to continue"},
            {"--tokens", Option::Takes::kValue, "N", "bytes to add (default 200)"},
            {"--temperature", Option::Takes::kValue, "T", "0 takes the likeliest byte (default: the run's)"},
            {"--seed", Option::Takes::kValue, "N", "another seed gives another text (default: the run's)"}}},
          Run};
}

}  // namespace annulus
