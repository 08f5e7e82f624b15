#pragma once

// A model from elsewhere as a run directory: config.textproto, and a checkpoint of step 0 in ckpt/, with the
// optimizer's moments zero. `train --resume` goes on from it; at step 0 nothing has been read, so that data
// and seed may be any.

#include <string>
#include <vector>

#include "annulus/train/config.h"
#include "annulus/train/safetensors.h"

namespace annulus {

// `parameters`: all of the model, in the accumulator dtype of the run.
absl::Status SaveModel(const std::string& run_dir, const ResolvedConfig& config,
                       std::vector<NamedTensor> parameters);

}  // namespace annulus
