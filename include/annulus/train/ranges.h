#pragma once

// Ranges of numbers that come from outside, and those of a model's fields, whoever writes them: the
// configuration or a config.json. Bounds on sizes are far above any use; they keep the products that later
// code forms (parameters, bytes) inside 64 bits.

#include <cstdint>
#include <limits>
#include <string>

#include "annulus/train/spec.h"

namespace annulus {

struct IntRange {
  int64_t low = 1, high = std::numeric_limits<int64_t>::max();
  bool Contains(int64_t value) const { return low <= value && value <= high; }
};

struct RealRange {
  enum class Bound { kClosed, kOpen };
  double low = 0.0, high = 0.0;
  Bound low_bound = Bound::kClosed, high_bound = Bound::kClosed;
  bool Contains(double value) const;  // no NaN
};

// "an integer from 1 to 8", "a number in (0, 1]".
std::string Describe(const IntRange& range);
std::string Describe(const RealRange& range);

inline constexpr IntRange kRanksRange{1, int64_t{1} << 20};
inline constexpr IntRange kWidthRange{1, int64_t{1} << 20};
inline constexpr IntRange kHeadsRange{1, int64_t{1} << 16};
inline constexpr IntRange kHeadDimRange{1, int64_t{1} << 16};
inline constexpr IntRange kWindowRange{0, int64_t{1} << 40};
inline constexpr IntRange kTapsRange{0, 8};
inline constexpr IntRange kChunkRange{1, int64_t{1} << 16};
inline constexpr IntRange kLengthRange{1, kMaxSeqLen};
inline constexpr IntRange kVocabularyRange{1, (int64_t{1} << 31) - 1};  // tokens are int32
inline constexpr RealRange kRopeThetaRange{1.0, 1e15};
inline constexpr RealRange kFactorRange{1.0, 1e6};
inline constexpr RealRange kPositiveRange{0.0, 1e9, RealRange::Bound::kOpen};
inline constexpr RealRange kNotNegativeRange{0.0, 1e9};
inline constexpr RealRange kEpsilonRange{0.0, 1.0, RealRange::Bound::kOpen, RealRange::Bound::kOpen};
inline constexpr RealRange kStddevRange{0.0, 10.0};

}  // namespace annulus
