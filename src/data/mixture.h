#pragma once

// Which source a training sequence comes from, in closed form. Weights become whole numbers of slots per
// period of 1024 sequences (largest remainder), so every period holds the exact proportions; the order of
// the slots is another pseudo-random permutation in each period.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "annulus/base/status.h"

namespace annulus {

class Mixture {
 public:
  static constexpr int64_t kPeriod = 1024;

  // A sequence is number `sequence` of those that `source` contributes to the run.
  struct Pick {
    int64_t source = 0;
    int64_t sequence = 0;
  };

  // Weights are positive and finite, and large enough for one slot of a period each.
  static absl::StatusOr<Mixture> Create(absl::Span<const double> weights, uint64_t seed);

  // At most one period of permutation steps, however large n is. n >= 0.
  Pick At(int64_t n) const;

  // Slots of each source in a period; the sum is kPeriod.
  const std::vector<int64_t>& slots() const { return slots_; }

 private:
  Mixture(std::vector<int64_t> slots, uint64_t seed);

  std::vector<int64_t> slots_;
  std::vector<int64_t> source_of_slot_;  // [kPeriod], before the permutation
  uint64_t seed_;
};

}  // namespace annulus
