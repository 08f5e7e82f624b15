#pragma once

// Text from a trained model, on one rank.

#include <functional>
#include <string>

#include "annulus/model/params.h"
#include "annulus/train/spec.h"

namespace annulus {

// Continues `prompt` (bytes are tokens: the vocabulary must have at least 256) by spec.tokens bytes and hands
// each to `emit`. Temperature 0 takes the likeliest byte; else sampling depends on (seed, index) only. The
// context is the last max_context tokens.
absl::Status Sample(const ModelSpec& model, const ParamStore& params, const SampleSpec& spec,
                    int64_t max_context, uint64_t seed, const std::function<void(char)>& emit);

}  // namespace annulus
