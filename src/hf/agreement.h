#pragma once

// What a config.json says more than once must say the same.

#include "model_config.h"

namespace annulus {

// `read`: what was made of it. Errors name the field, what stands there and what it follows from.
absl::Status CheckAgreement(const HfConfig& read, const nlohmann::json& config);

}  // namespace annulus
