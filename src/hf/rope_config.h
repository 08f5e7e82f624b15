#pragma once

// Rotary positions in config.json: "rope_theta" and "rope_scaling", or both in "rope_parameters". Of our own
// class bases are the layers', and scaling is "long_rope": Transformers checks what it knows by name.

#include <nlohmann/json.hpp>
#include <optional>

#include "tensor_names.h"

namespace annulus {

void WriteRope(HfClass of, const ModelSpec& spec, nlohmann::json* config);

// Sets spec->rope_scaling; returns the base of all layers, none for a class without one.
absl::StatusOr<std::optional<double>> ReadRope(HfClass of, const nlohmann::json& config, ModelSpec* spec);

}  // namespace annulus
