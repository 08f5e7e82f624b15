#include "dense.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "annulus/ops/linear.h"

namespace annulus {
namespace {

// Turns rows p and q of a by the angle with this cosine and sine.
void TurnRows(Dense& a, int64_t p, int64_t q, double cosine, double sine) {
  double *x = a.row(p), *y = a.row(q);
  for (int64_t i = 0; i < a.columns; ++i) {
    const double u = x[i], v = y[i];
    x[i] = cosine * u - sine * v;
    y[i] = sine * u + cosine * v;
  }
}

void TurnColumns(Dense& a, int64_t p, int64_t q, double cosine, double sine) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const double u = a(i, p), v = a(i, q);
    a(i, p) = cosine * u - sine * v;
    a(i, q) = sine * u + cosine * v;
  }
}

}  // namespace

Dense Transposed(const Dense& a) {
  Dense t = Dense::Zeros(a.columns, a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.columns; ++c) t(c, r) = a(r, c);
  }
  return t;
}

Dense TimesTransposed(const Dense& a, const Dense& b) {
  ANNULUS_CHECK(a.columns == b.columns) << a.columns << " and " << b.columns;
  Dense product = Dense::Zeros(a.rows, b.rows);
  const auto matrix = [](const Dense& m) {
    return ConstMatrixRef(m.values.data(), DType::kF64, m.rows, m.columns, m.columns);
  };
  Context ctx{Device{}};
  ANNULUS_CHECK_OK(LinearForward(ctx, matrix(a), matrix(b), Write::kOverwrite,
                                 {product.values.data(), DType::kF64, a.rows, b.rows, b.rows}));
  return product;
}

Dense Times(const Dense& a, const Dense& b) { return TimesTransposed(a, Transposed(b)); }

Dense Eigenvectors(Dense a) {
  ANNULUS_CHECK(a.rows == a.columns);
  const int64_t n = a.rows;
  Dense vectors = Dense::Zeros(n, n);  // as rows
  for (int64_t i = 0; i < n; ++i) vectors(i, i) = 1;
  double norm = 0;
  for (const double x : a.values) norm += x * x;
  // Sweeps converge quadratically: some ten reach rounding for any size of use.
  constexpr int kMostSweeps = 60;
  constexpr double kRounding = 1e-30;  // of squares
  for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
    double outside = 0;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) outside += 2 * a(p, q) * a(p, q);
    }
    if (outside <= kRounding * norm) break;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        if (a(p, q) == 0) continue;
        const double ratio = (a(q, q) - a(p, p)) / (2 * a(p, q));
        const double tangent = (ratio < 0 ? -1 : 1) / (std::abs(ratio) + std::hypot(ratio, 1.0));
        const double cosine = 1 / std::hypot(tangent, 1.0), sine = tangent * cosine;
        TurnRows(a, p, q, cosine, sine);
        TurnColumns(a, p, q, cosine, sine);
        TurnRows(vectors, p, q, cosine, sine);
      }
    }
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a(i, i) > a(j, j); });
  Dense sorted = Dense::Zeros(n, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < n; ++r) sorted(r, i) = vectors(order[static_cast<size_t>(i)], r);
  }
  return sorted;
}

}  // namespace annulus
