#pragma once

// Checks between fields, on the plain structs. Each finding reads "path=value: expected ...".

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/train/spec.h"

namespace annulus::config {

// With `world`, also what that number of ranks asks for; parallel.dp = 0 stands for world / (cp * tp).
std::vector<std::string> CheckRun(const RunSpec& spec, std::optional<int64_t> world);

}  // namespace annulus::config
