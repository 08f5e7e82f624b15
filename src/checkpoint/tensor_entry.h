#pragma once

// What a header or a manifest says about one tensor: element type and shape, as JSON.

#include <cstdint>
#include <nlohmann/json.hpp>

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"
#include "annulus/device/tensor.h"

namespace annulus {

absl::string_view SafetensorsName(DType dtype);  // "F32"

struct TensorType {
  DType dtype = DType::kF32;
  Shape shape;
  friend bool operator==(const TensorType&, const TensorType&) = default;

  int64_t bytes() const { return shape.elements() * SizeOf(dtype); }
};

std::string ToString(const TensorType& type);  // "F32 [2, 3]"

// Element types that the format has and this program does not are refused by name; so are shapes with more
// than kMaxRank dimensions or whose bytes, empty dimensions left out, exceed 63 bits.
absl::StatusOr<TensorType> TensorTypeFromJson(const nlohmann::json& dtype, const nlohmann::json& shape,
                                              absl::string_view where);

}  // namespace annulus
