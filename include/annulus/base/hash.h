#pragma once

// XXH3-64 of bytes: plan hashes, data fingerprints, checkpoint files, names of random streams.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

#include "absl/strings/string_view.h"

namespace annulus {

uint64_t Hash64(const void* data, size_t bytes, uint64_t seed = 0);
inline uint64_t Hash64(absl::string_view s, uint64_t seed = 0) { return Hash64(s.data(), s.size(), seed); }
template <size_t N>
uint64_t Hash64(const char (&literal)[N], uint64_t bytes_or_seed) = delete;  // would be taken for bytes

// The same hash over data that comes in pieces.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void Update(const void* data, size_t bytes);
  template <typename T>
  void UpdateValue(const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>);
    Update(&value, sizeof(value));
  }
  uint64_t Digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string Hex64(uint64_t value);  // 16 lower-case digits

}  // namespace annulus
