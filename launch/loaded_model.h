#pragma once

// A configuration's model with the parameters of a checkpoint, on the CPU of one process, and what it makes
// of tokens.

#include <memory>
#include <string>
#include <vector>

#include "annulus/device/context.h"
#include "annulus/model/params.h"
#include "annulus/train/config.h"
#include "annulus/train/data.h"
#include "annulus/train/optimizer.h"
#include "commands.h"

namespace annulus {

// Under mpirun one rank is enough for what is done alone: the others would do the same in its place.
bool IsFirstRank();

// A run directory stands for the checkpoints in it.
std::string CheckpointPath(const std::string& operand);

struct LoadedModel {
  ResolvedConfig config;
  std::string path;  // of the checkpoint's step
  int64_t step = 0;
  std::unique_ptr<ParamStore> params;  // f32, or f64 where the run computes so

  const ModelSpec& spec() const { return config.spec.model; }
  TensorFinder finder() const;
};

// The operand is a configuration, which --set overrides; --checkpoint names the checkpoint.
absl::StatusOr<LoadedModel> LoadModel(const Arguments& arguments);

// Logits of one sequence, [tokens, vocabulary].
absl::StatusOr<std::vector<double>> LogitsOf(const ModelSpec& spec, const ParamStore& params,
                                             const std::vector<int32_t>& tokens);

// Mean loss in nats per counted token.
absl::StatusOr<double> MeanLossOf(const RunSpec& run, const ModelSpec& spec, const ParamStore& params,
                                  const std::vector<Sequence>& sequences);

}  // namespace annulus
