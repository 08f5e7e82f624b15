#pragma once

// Inputs that the tests of ops along the sequence share: documents, segments and buffers of their ages.

#include "annulus/base/row_range.h"
#include "ops/harness.h"

namespace annulus::testing {

// Ages [rows, batch] of documents of `length` tokens, which start at other rows in other items. The first row
// continues a document of at least seven tokens unless one starts there; length 0: it goes on to the end.
inline std::vector<int32_t> DocumentAges(int64_t rows, int64_t batch, int64_t length) {
  constexpr int64_t kBefore = 7, kShift = 3;
  std::vector<int32_t> ages;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t item = 0; item < batch; ++item) {
      const int64_t since = length > 0 ? (row + kShift * item) % length : row + kBefore;
      const bool first_goes_on = length > 0 && row < since;
      ages.push_back(static_cast<int32_t>(first_goes_on ? row + kBefore : since));
    }
  }
  return ages;
}

template <typename T>
std::vector<T> Absolute(std::vector<T> values) {
  for (T& x : values) x = std::abs(x);
  return values;
}

// Values in [low, high).
template <typename T>
std::vector<T> UniformValues(int64_t n, absl::string_view stream, double low, double high) {
  std::vector<T> values = NormalValues<T>(n, stream);
  for (T& x : values)
    x = static_cast<T>(low + (high - low) * 0.5 * std::erfc(-static_cast<double>(x) / std::sqrt(2.0)));
  return values;
}

// Rows [0, rows) in runs of the given lengths; the last takes what is left.
inline std::vector<RowRange> SegmentsOf(int64_t rows, const std::vector<int64_t>& lengths) {
  std::vector<RowRange> segments;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    segments.push_back({begin, std::min(begin + length, rows)});
    begin = segments.back().end;
  }
  segments.push_back({begin, rows});
  return segments;
}

}  // namespace annulus::testing
