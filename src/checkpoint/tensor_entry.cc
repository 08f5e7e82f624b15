#include "tensor_entry.h"

#include <algorithm>
#include <array>
#include <string>

#include "strict_json.h"

namespace annulus {
namespace {

constexpr std::array kReadable = {DType::kF64, DType::kF32, DType::kBF16,
                                  DType::kI64, DType::kI32, DType::kU8};

// The other types of safetensors 0.5.
constexpr std::array<absl::string_view, 9> kRefused = {"BOOL", "I8",  "F8_E5M2", "F8_E4M3", "I16",
                                                       "U16",  "F16", "U32",     "U64"};

absl::StatusOr<DType> DTypeFromJson(const nlohmann::json& value, absl::string_view where) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string name, AsString(value, absl::StrCat(where, ": dtype")));
  for (const DType dtype : kReadable)
    if (SafetensorsName(dtype) == name) return dtype;
  const bool standard = std::find(kRefused.begin(), kRefused.end(), name) != kRefused.end();
  return Invalid(where, ": dtype=", standard ? name : ToJsonText(value, -1).value().substr(0, 60),
                 standard ? " is not supported" : " is unknown", ": expected F64, F32, BF16, I64, I32 or U8");
}

}  // namespace

absl::string_view SafetensorsName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF64:
      return "F64";
    case DType::kBF16:
      return "BF16";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kU8:
      return "U8";
  }
  return "unknown";
}

std::string ToString(const TensorType& type) {
  return absl::StrCat(SafetensorsName(type.dtype), " ", ToString(type.shape));
}

absl::StatusOr<TensorType> TensorTypeFromJson(const nlohmann::json& dtype, const nlohmann::json& shape,
                                              absl::string_view where) {
  TensorType type;
  ANNULUS_ASSIGN_OR_RETURN(type.dtype, DTypeFromJson(dtype, where));
  ANNULUS_RETURN_IF_ERROR(ExpectArray(shape, absl::StrCat(where, ": shape")));
  if (shape.size() > static_cast<size_t>(kMaxRank))
    return Invalid(where, ": shape has ", shape.size(), " dimensions: expected at most ", kMaxRank);
  std::array<int64_t, kMaxRank> dims{};
  int64_t extent = SizeOf(type.dtype);
  for (size_t i = 0; i < shape.size(); ++i) {
    ANNULUS_ASSIGN_OR_RETURN(dims[i], AsCount(shape[i], absl::StrCat(where, ": shape[", i, "]")));
    if (__builtin_mul_overflow(extent, std::max<int64_t>(dims[i], 1), &extent))
      return Invalid(where, ": shape=", shape.dump(), ": expected fewer than 2^63 bytes");
  }
  type.shape = Shape(absl::Span<const int64_t>(dims.data(), shape.size()));
  return type;
}

}  // namespace annulus
