#pragma once

// Fields of the config.json of each class that stand for a field of ModelSpec, and those whose value our
// models fix. Tables: export writes what import reads.

#include <functional>
#include <nlohmann/json.hpp>
#include <variant>
#include <vector>

#include "annulus/train/ranges.h"
#include "tensor_names.h"

namespace annulus {

struct HfField {
  const char* name;
  std::function<nlohmann::json(const ModelSpec&)> get;
  std::function<void(const nlohmann::json&, ModelSpec*)> set;
  // Of booleans: none.
  std::variant<std::monostate, IntRange, RealRange> range;
  // Where it is absent or null. Empty: it must be there.
  std::function<nlohmann::json(const ModelSpec&)> absent = {};
};

// In the order in which they are read.
const std::vector<HfField>& FieldsOf(HfClass of);

struct HfFixed {
  const char* name;
  nlohmann::json value;   // that our models need
  nlohmann::json absent;  // what the class takes where there is none
};
const std::vector<HfFixed>& FixedOf(HfClass of);

// Layers of a NemotronH as its letters: "M-M*-".
struct NemotronLetter {
  BranchKind kind;
  char letter;
};
inline constexpr NemotronLetter kNemotronLetters[] = {
    {BranchKind::kMamba, 'M'}, {BranchKind::kAttention, '*'}, {BranchKind::kMlp, '-'}};
std::string NemotronPattern(const ModelSpec& spec);

// InvalidArgument: "config.json: field=value: expected ...".
absl::Status Unexpected(absl::string_view field, const nlohmann::json& value, absl::string_view expected);

// Numbers of a range. Errors as above.
absl::StatusOr<int64_t> ReadInt(absl::string_view field, const nlohmann::json& value, const IntRange& range);
absl::StatusOr<double> ReadReal(absl::string_view field, const nlohmann::json& value, const RealRange& range);

}  // namespace annulus
