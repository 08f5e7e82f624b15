#pragma once

// What the layers of a model ask of each other. Each answer reads "<what is wrong>; expected <what>"; empty:
// nothing is wrong.

#include <string>
#include <vector>

#include "annulus/model/spec.h"

namespace annulus {

const BranchSpec* FindBranch(const LayerSpec& layer, BranchKind kind);  // nullptr: there is none

// Of a layer whose attention takes keys and values from an earlier layer: that one has its own, rotated
// alike.
std::string SharedKvProblem(const std::vector<LayerSpec>& layers, size_t layer);

// Of a layer with tied branches: the first layer with each name has the same branches.
std::string TieProblem(const std::vector<LayerSpec>& layers, size_t layer);

}  // namespace annulus
