#include <cstdio>

#include "annulus/train/checkpoint.h"
#include "annulus/train/config.h"
#include "annulus/train/optimizer.h"
#include "annulus/train/sample.h"
#include "annulus/train/trainer.h"
#include "commands.h"

namespace annulus {
namespace {

absl::Status Run(const Arguments& arguments, const std::string&) {
  if (!arguments.Has("--prompt")) return Invalid("--prompt: expected TEXT to continue");
  ANNULUS_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(arguments.operand()));
  ANNULUS_ASSIGN_OR_RETURN(
      const ResolvedConfig config,
      LoadConfig(checkpoint.path() + "/manifest.json: config", checkpoint.meta().config, {}));
  const RunSpec& spec = config.spec;
  ParamStore params(Device{}, DTypeOf(spec.compute), BuildParamTable(spec.model), 1);
  ANNULUS_RETURN_IF_ERROR(
      RestoreParameters(params, [&](absl::string_view name) { return checkpoint.Find(name); }));

  SampleSpec sample = spec.sample;
  sample.prompt = arguments.Last("--prompt", "");
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> tokens, arguments.PositiveInt("--tokens"));
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> seed, arguments.PositiveInt("--seed"));
  sample.tokens = tokens.value_or(200);
  if (arguments.Last("--temperature", "") == "0") {
    sample.temperature = 0;
  } else {
    ANNULUS_ASSIGN_OR_RETURN(sample.temperature,
                             arguments.PositiveNumber("--temperature", sample.temperature));
  }
  std::fputs(sample.prompt.c_str(), stdout);
  ANNULUS_RETURN_IF_ERROR(Sample(spec.model, params, sample, spec.data.seq_len,
                                 static_cast<uint64_t>(seed.value_or(static_cast<int64_t>(spec.seed))),
                                 [](char byte) {
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
           "continues a text with a checkpoint (a step directory, or a directory of them)",
           {{"--prompt", Option::Takes::kValue, "TEXT", "text to continue"},
            {"--tokens", Option::Takes::kValue, "N", "bytes to add (default 200)"},
            {"--temperature", Option::Takes::kValue, "T", "0 takes the likeliest byte (default: the run's)"},
            {"--seed", Option::Takes::kValue, "N", "another seed gives another text (default: the run's)"}}},
          Run};
}

}  // namespace annulus
