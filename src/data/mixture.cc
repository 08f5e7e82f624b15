#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "annulus/base/check.h"
#include "annulus/base/random.h"

namespace annulus {

absl::StatusOr<Mixture> Mixture::Create(absl::Span<const double> weights, uint64_t seed) {
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] > 0) || !std::isfinite(weights[i])) {
      return Invalid("data.train[", i, "].weight=", weights[i], ": expected a finite number above 0");
    }
    sum += weights[i];
  }
  if (!std::isfinite(sum)) return Invalid("data.train.weight: expected a finite sum of the weights");

  std::vector<int64_t> slots(weights.size());
  std::vector<double> remainders(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const double exact = weights[i] / sum * kPeriod;
    slots[i] = static_cast<int64_t>(exact);
    remainders[i] = exact - static_cast<double>(slots[i]);
  }
  // Largest remainder: the slots left over go to the sources that rounding down cost the most; the
  // earlier source where it cost the same.
  std::vector<size_t> order(weights.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return remainders[a] > remainders[b]; });
  const int64_t left = kPeriod - std::accumulate(slots.begin(), slots.end(), int64_t{0});
  ANNULUS_CHECK(left >= 0 && left <= static_cast<int64_t>(order.size())) << left << " slots left";
  for (int64_t i = 0; i < left; ++i) ++slots[order[static_cast<size_t>(i)]];

  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] > 0) continue;
    return Invalid("data.train[", i, "].weight=", weights[i], ": expected at least ", sum / kPeriod, ", 1/",
                   kPeriod, " of the sum of the weights");
  }
  return Mixture(std::move(slots), seed);
}

Mixture::Mixture(std::vector<int64_t> slots, uint64_t seed) : slots_(std::move(slots)), seed_(seed) {
  for (size_t source = 0; source < slots_.size(); ++source) {
    source_of_slot_.insert(source_of_slot_.end(), static_cast<size_t>(slots_[source]),
                           static_cast<int64_t>(source));
  }
}

Mixture::Pick Mixture::At(int64_t n) const {
  ANNULUS_CHECK(n >= 0) << "sequence " << n;
  if (slots_.size() == 1) return {0, n};
  const int64_t period = n / kPeriod, slot = n % kPeriod;
  const Permutation order(kPeriod, seed_, absl::StrCat("data/mixture/", period));
  const auto source_at = [&](int64_t i) {
    return source_of_slot_[static_cast<size_t>(order(static_cast<uint64_t>(i)))];
  };
  const int64_t source = source_at(slot);
  int64_t earlier = 0;  // picks of the same source in this period; earlier periods held slots_[source] each
  for (int64_t i = 0; i < slot; ++i) earlier += source_at(i) == source ? 1 : 0;
  return {source, period * slots_[static_cast<size_t>(source)] + earlier};
}

}  // namespace annulus
