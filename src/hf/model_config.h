#pragma once

// config.json of a model: which class can express one of ours, what it then says, and what one of its says in
// our terms.

#include <nlohmann/json.hpp>

#include "tensor_names.h"

namespace annulus {

// What keeps a model from being of this class, a line each; empty if nothing does.
std::string Misfits(HfClass of, const ModelSpec& spec);

// Of a model that fits.
nlohmann::json HfConfigOf(HfClass of, const ModelSpec& spec, int64_t max_length);

struct HfConfig {
  HfClass of = HfClass::kLlama;
  ModelSpec spec;
  int64_t max_length = 0;
  RopePairs pairs = RopePairs::kHalves;
};
// Errors name the field, what stands there and what was expected.
absl::StatusOr<HfConfig> ReadHfConfig(const nlohmann::json& config);

// JSON with numbers that are not finite, as Python writes them.
std::string PythonJsonText(const nlohmann::json& value);
absl::StatusOr<nlohmann::json> ParsePythonJson(absl::string_view text);

}  // namespace annulus
