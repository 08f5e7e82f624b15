#pragma once

// Whether the plans that parallel.exchange asks for can be on parallel.cp ranks.

#include <string>
#include <vector>

#include "annulus/train/spec.h"

namespace annulus::config {

void CheckExchange(const ParallelSpec& parallel, std::vector<std::string>* findings);

}  // namespace annulus::config
