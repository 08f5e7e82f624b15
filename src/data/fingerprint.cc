#include "fingerprint.h"

#include <algorithm>

namespace annulus {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kSampledPages = 64;

}  // namespace

void AddFile(const MappedFile& file, Hasher* hasher) {
  const absl::Span<const uint8_t> bytes = file.bytes();
  hasher->UpdateValue(static_cast<uint64_t>(bytes.size()));
  if (bytes.size() <= kSampledPages * kPageBytes) return hasher->Update(bytes.data(), bytes.size());
  const uint64_t last = bytes.size() - kPageBytes;
  for (uint64_t i = 0; i < kSampledPages; ++i) {
    // Divided first: last * i could overflow for the largest files, and a few bytes either way do not matter.
    const uint64_t begin = i + 1 == kSampledPages ? last : last / (kSampledPages - 1) * i;
    hasher->Update(bytes.data() + begin, kPageBytes);
  }
}

}  // namespace annulus
