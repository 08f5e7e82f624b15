#include "annulus/base/hash.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace annulus {
namespace {

template <typename... Args>
concept CanHash = requires(Args... args) {
  Hash64(args...);
};

TEST(Hash64, KnownAnswers) {
  // XXH3-64 of nothing with seed 0, from the specification's reference implementation.
  EXPECT_EQ(Hash64(""), 0x2d06800538d394c2u);
  EXPECT_EQ(Hash64(nullptr, 0), 0x2d06800538d394c2u);
  EXPECT_NE(Hash64("a"), Hash64("b"));
  EXPECT_NE(Hash64("a"), Hash64(absl::string_view("a"), 1));
  static_assert(!CanHash<const char(&)[2], int>, "is 1 a size or a seed?");
}

TEST(Hasher, PiecesGiveTheHashOfTheWhole) {
  std::vector<uint8_t> data(5000);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 31 + i / 256);
  for (const size_t piece : {1, 7, 64, 255, 256, 257, 1024, 5000}) {
    Hasher hasher;
    for (size_t at = 0; at < data.size(); at += piece)
      hasher.Update(data.data() + at, std::min(piece, data.size() - at));
    EXPECT_EQ(hasher.Digest(), Hash64(data.data(), data.size())) << "pieces of " << piece;
  }
  Hasher empty;
  EXPECT_EQ(empty.Digest(), Hash64(""));
}

TEST(Hasher, UpdateValueHashesItsBytes) {
  const uint32_t value = 0x64636261;  // "abcd", little-endian
  Hasher hasher;
  hasher.UpdateValue(value);
  EXPECT_EQ(hasher.Digest(), Hash64("abcd"));
}

TEST(Hex64, HasSixteenDigits) {
  EXPECT_EQ(Hex64(0), "0000000000000000");
  EXPECT_EQ(Hex64(0xabc), "0000000000000abc");
  EXPECT_EQ(Hex64(~uint64_t{0}), "ffffffffffffffff");
}

}  // namespace
}  // namespace annulus
