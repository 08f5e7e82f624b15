#pragma once

// Counter-based random numbers: a value is f(seed, stream name, index), so initialisation and data never
// depend on the world size or on the order of calls. Philox-4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011).

#include <array>
#include <cstdint>

#include "absl/strings/string_view.h"

namespace annulus {

// One Philox-4x32-10 block.
std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

class RandomStream {
 public:
  RandomStream(uint64_t seed, absl::string_view stream);

  uint64_t Bits(uint64_t index) const;   // 64 uniform bits
  double Uniform(uint64_t index) const;  // [0, 1), 53 bits
  double Normal(uint64_t index) const;   // mean 0, variance 1 (Box-Muller)
  // Uniform in [0, n), n >= 1; the bias of at most n / 2^64 is ignored.
  uint64_t Below(uint64_t index, uint64_t n) const;

 private:
  std::array<uint32_t, 2> key_;
  uint64_t stream_;
};

// A pseudo-random permutation of [0, n), evaluated at one index in O(1) memory: a Feistel network on the
// next even power of two with cycle walking.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed, absl::string_view stream);
  uint64_t operator()(uint64_t index) const;  // index in [0, n)

 private:
  uint64_t n_;
  int half_bits_;
  RandomStream random_;
};

}  // namespace annulus
