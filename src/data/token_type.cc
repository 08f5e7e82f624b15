#include "token_type.h"

#include "annulus/base/check.h"

namespace annulus {
namespace {

// Calls fn.template operator()<T>() with the C++ type of `type`.
template <typename Fn>
decltype(auto) VisitTokenType(TokenType type, Fn&& fn) {
  switch (type) {
    case TokenType::kU8: return fn.template operator()<uint8_t>();
    case TokenType::kI8: return fn.template operator()<int8_t>();
    case TokenType::kU16: return fn.template operator()<uint16_t>();
    case TokenType::kI16: return fn.template operator()<int16_t>();
    case TokenType::kU32: return fn.template operator()<uint32_t>();
    case TokenType::kI32: return fn.template operator()<int32_t>();
    case TokenType::kI64: break;
  }
  ANNULUS_CHECK(type == TokenType::kI64) << "token type " << static_cast<int>(type);
  return fn.template operator()<int64_t>();
}

}  // namespace

int64_t SizeOf(TokenType type) {
  return VisitTokenType(type, []<typename T>() { return static_cast<int64_t>(sizeof(T)); });
}

void WidenTokens(TokenType type, const uint8_t* bytes, absl::Span<int64_t> out) {
  VisitTokenType(type, [&]<typename T>() {
    for (size_t i = 0; i < out.size(); ++i) out[i] = LoadUnaligned<T>(bytes + i * sizeof(T));
  });
}

}  // namespace annulus
