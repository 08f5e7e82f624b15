#include "annulus/base/hash.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "annulus/base/check.h"

namespace annulus {

struct Hasher::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Hasher::Hasher() : state_(std::make_unique<State>()) {
  ANNULUS_CHECK(state_->xxh != nullptr && XXH3_64bits_reset(state_->xxh) == XXH_OK);
}
Hasher::~Hasher() = default;

void Hasher::Update(const void* data, size_t bytes) { XXH3_64bits_update(state_->xxh, data, bytes); }
uint64_t Hasher::Digest() const { return XXH3_64bits_digest(state_->xxh); }

uint64_t Hash64(const void* data, size_t bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, bytes, seed);
}

std::string Hex64(uint64_t value) { return absl::StrCat(absl::Hex(value, absl::kZeroPad16)); }

}  // namespace annulus
