#pragma once

// Small dense matrices in doubles, for conversions of weights.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus {

struct Dense {
  int64_t rows = 0, columns = 0;
  std::vector<double> values = {};  // row-major

  static Dense Zeros(int64_t rows, int64_t columns) {
    return {rows, columns, std::vector<double>(static_cast<std::size_t>(rows * columns))};
  }
  double& operator()(int64_t r, int64_t c) { return values[static_cast<std::size_t>(r * columns + c)]; }
  double operator()(int64_t r, int64_t c) const { return values[static_cast<std::size_t>(r * columns + c)]; }
  const double* row(int64_t r) const { return values.data() + r * columns; }
  double* row(int64_t r) { return values.data() + r * columns; }
};

Dense Transposed(const Dense& a);
Dense TimesTransposed(const Dense& a, const Dense& b);  // a b^T
Dense Times(const Dense& a, const Dense& b);

// Eigenvectors of a symmetric matrix, as columns, by descending eigenvalue (Jacobi's rotations: orthogonal to
// rounding, whatever the spectrum).
Dense Eigenvectors(Dense symmetric);

}  // namespace annulus
