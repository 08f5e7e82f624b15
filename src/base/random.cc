#include "annulus/base/random.h"

#include <cmath>
#include <utility>

#include "annulus/base/check.h"
#include "annulus/base/hash.h"

namespace annulus {
namespace {

// Multipliers and Weyl constants of Philox-4x32 (SC 2011, table 2).
constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;

double ToUnit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1.0p-53; }

}  // namespace

std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kMul0} * c[0], p1 = uint64_t{kMul1} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k = {k[0] + kWeyl0, k[1] + kWeyl1};
  }
  return c;
}

RandomStream::RandomStream(uint64_t seed, absl::string_view stream)
    : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, stream_(Hash64(stream)) {}

uint64_t RandomStream::Bits(uint64_t index) const {
  const auto block = Philox({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                             static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                            key_);
  return uint64_t{block[0]} << 32 | block[1];
}

double RandomStream::Uniform(uint64_t index) const { return ToUnit(Bits(index)); }

double RandomStream::Normal(uint64_t index) const {
  const auto block = Philox({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                             static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                            key_);
  const double u1 = 1.0 - ToUnit(uint64_t{block[0]} << 32 | block[1]);  // (0, 1]: log stays finite
  const double u2 = ToUnit(uint64_t{block[2]} << 32 | block[3]);
  return std::sqrt(-2.0 * std::log(u1)) * std::cos(6.283185307179586477 * u2);
}

uint64_t RandomStream::Below(uint64_t index, uint64_t n) const {
  ANNULUS_CHECK(n >= 1);
  return static_cast<uint64_t>(static_cast<unsigned __int128>(Bits(index)) * n >> 64);
}

Permutation::Permutation(uint64_t n, uint64_t seed, absl::string_view stream)
    : n_(n), half_bits_(1), random_(seed, stream) {
  ANNULUS_CHECK(n >= 1 && n <= uint64_t{1} << 62) << "n " << n;
  while (uint64_t{1} << (2 * half_bits_) < n) ++half_bits_;
}

uint64_t Permutation::operator()(uint64_t index) const {
  ANNULUS_CHECK(index < n_) << index << " of " << n_;
  constexpr int kFeistelRounds = 6;
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  do {  // cycle walking: at most 4 expected passes, as the domain is below 4 n
    uint64_t left = index >> half_bits_, right = index & mask;
    for (uint64_t round = 0; round < kFeistelRounds; ++round) {
      const uint64_t mixed = random_.Bits(round << 32 ^ right) & mask;
      left ^= mixed;
      std::swap(left, right);
    }
    index = left << half_bits_ | right;
  } while (index >= n_);
  return index;
}

}  // namespace annulus
