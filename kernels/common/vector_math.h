#pragma once

// Branch-free exponential that compilers vectorise: std::exp is a call per element.
//   exp(x) = 2^n exp(r),  n = round(x / ln 2),  r = x - n ln 2 in two steps (Cody and Waite, 1980), |r| <=
//   ln(2)/2, exp(r) by its Taylor series, long enough that the remainder is below a tenth of an ulp.
// At most 2 ulp. Results that would be subnormal are 0; x above `highest` gives exp(highest), not infinity;
// NaN stays NaN.

#include <bit>
#include <cstdint>

namespace annulus::kernels {

template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part has 9 bits
  static constexpr float kLowest = -87.3365f, kHighest = 88.0f;
  static constexpr int kDegree = 7;
};

template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0x1.62e42feep-1,
                          kLn2Low = 0x1.a39ef35793c76p-33;  // the high part: 32 bits
  static constexpr double kLowest = -708.3964, kHighest = 709.0;
  static constexpr int kDegree = 13;
};

template <typename T>
inline T Exp(T x) {
  using Traits = ExpTraits<T>;
  using Bits = typename Traits::Bits;
  constexpr auto kInverseFactorial = [] {
    struct {
      T value[Traits::kDegree + 1];
    } table{};
    double factorial = 1;
    for (int k = 0; k <= Traits::kDegree; ++k) {
      factorial *= k > 0 ? k : 1;
      table.value[k] = static_cast<T>(1 / factorial);
    }
    return table;
  }();
  T bounded = x > Traits::kHighest ? Traits::kHighest : x;  // a NaN fails both comparisons and passes
  bounded = bounded < Traits::kLowest ? Traits::kLowest : bounded;
  const T shifted = bounded * Traits::kLog2E + Traits::kRound;
  const T n = shifted - Traits::kRound;
  const T r = (bounded - n * Traits::kLn2High) - n * Traits::kLn2Low;
  T series = kInverseFactorial.value[Traits::kDegree];
  for (int k = Traits::kDegree - 1; k >= 0; --k) series = series * r + kInverseFactorial.value[k];
  // The shift drops all but the low bits of `shifted`, which hold n.
  const Bits power = (std::bit_cast<Bits>(shifted) + Traits::kBias) << Traits::kMantissaBits;
  const T result = series * std::bit_cast<T>(power);
  return x < Traits::kLowest ? T{0} : result;
}

}  // namespace annulus::kernels
