#pragma once

// Element types of tensors, and the dispatch from a runtime dtype to a C++ type.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "absl/strings/string_view.h"
#include "annulus/base/check.h"

namespace annulus {

enum class DType : uint8_t { kF32, kF64, kBF16, kI32, kI64, kU8 };

// bfloat16: the upper half of an f32. Stored by the host, computed on by GPUs (there it is __nv_bfloat16).
struct BFloat16 {
  uint16_t bits = 0;
  friend bool operator==(const BFloat16&, const BFloat16&) = default;
};
float ToFloat(BFloat16 x);
BFloat16 ToBFloat16(float x);  // to nearest even; NaN stays NaN

constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
    case DType::kBF16:
      return 2;
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
    case DType::kU8:
      return 1;
  }
  return 0;
}

absl::string_view Name(DType dtype);

template <typename T>
constexpr DType DTypeOf() {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_same_v<U, float>)
    return DType::kF32;
  else if constexpr (std::is_same_v<U, double>)
    return DType::kF64;
  else if constexpr (std::is_same_v<U, BFloat16>)
    return DType::kBF16;
  else if constexpr (std::is_same_v<U, int32_t>)
    return DType::kI32;
  else if constexpr (std::is_same_v<U, int64_t>)
    return DType::kI64;
  else {
    static_assert(std::is_same_v<U, uint8_t>, "no DType for this type");
    return DType::kU8;
  }
}

// Type in which sums of `dtype` are carried (partial attention results, gradients, optimizer state).
constexpr DType AccumOf(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Calls fn.template operator()<T>() with the C++ type of a floating dtype that hosts compute in.
template <typename Fn>
decltype(auto) VisitFloat(DType dtype, Fn&& fn) {
  ANNULUS_CHECK(dtype == DType::kF32 || dtype == DType::kF64) << "dtype " << Name(dtype);
  if (dtype == DType::kF64) return fn.template operator()<double>();
  return fn.template operator()<float>();
}

}  // namespace annulus
