#pragma once

#include <algorithm>
#include <vector>

namespace annulus {

// The mean of the two in the middle where there are as many; not empty.
inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace annulus
