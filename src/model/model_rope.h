#pragma once

// The rotary frequencies of a model's branches.

#include <optional>

#include "annulus/model/spec.h"
#include "annulus/ops/rope.h"

namespace annulus {

// Of the `dim` elements of a head that turn; none where the branch has no position encoding.
std::optional<RopeFrequencies> RopeOf(const ModelSpec& spec, const BranchSpec& branch, int64_t dim);

}  // namespace annulus
