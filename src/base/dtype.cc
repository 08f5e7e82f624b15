#include "annulus/base/dtype.h"

#include <bit>
#include <cmath>

namespace annulus {

float ToFloat(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

BFloat16 ToBFloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t upper = bits >> 16;
  // The payload of a NaN may lie in the lower half alone: the quiet bit keeps it from becoming an infinity.
  if (std::isnan(x)) return {static_cast<uint16_t>(upper | 0x40)};
  // Just below one half is added, and one more where the upper half is odd: a tie rounds to even.
  return {static_cast<uint16_t>((bits + 0x7fff + (upper & 1)) >> 16)};
}

absl::string_view Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF64:
      return "f64";
    case DType::kBF16:
      return "bf16";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU8:
      return "u8";
  }
  return "unknown";
}

}  // namespace annulus
