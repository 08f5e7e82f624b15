#pragma once

// Text from a trained model, on one rank or on those of a tensor-parallel group.

#include <functional>
#include <string>

#include "annulus/model/params.h"
#include "annulus/parallel/tensor_parallel.h"
#include "annulus/train/spec.h"

namespace annulus {

struct TrainedModel {
  const ModelSpec& spec;
  const ParamStore& params;    // for this rank of `tensor`, on the device of the context
  int64_t max_context = 0;     // tokens that the next one is drawn from
  TensorParallel tensor = {};  // one rank
};

// Continues `prompt` (bytes are tokens: the vocabulary must have at least 256) by spec.tokens bytes and hands
// each to `emit`. Temperature 0 takes the likeliest byte; else sampling depends on (seed, index) only.
// Collective over model.tensor: every rank gets the same bytes.
absl::Status Sample(Context& ctx, const TrainedModel& model, const SampleSpec& spec, uint64_t seed,
                    const std::function<void(char)>& emit);

}  // namespace annulus
