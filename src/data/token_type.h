#pragma once

// Integer types in which token files store ids, and the loop that widens them. Files are little-endian
// and their arrays may lie at any byte, so every value is copied out.

#include <bit>
#include <cstdint>
#include <cstring>

#include "absl/types/span.h"

namespace annulus {

static_assert(std::endian::native == std::endian::little, "token files are little-endian");

enum class TokenType : uint8_t { kU8, kI8, kU16, kI16, kU32, kI32, kI64 };

int64_t SizeOf(TokenType type);

template <typename T>
T LoadUnaligned(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

// out[i] = value i of the array of `type` that begins at `bytes`.
void WidenTokens(TokenType type, const uint8_t* bytes, absl::Span<int64_t> out);

}  // namespace annulus
