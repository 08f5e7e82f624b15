#pragma once

// Row-major matrix product on the CPU, C = alpha op(A) op(B) + beta C, over CBLAS, and the solution of
// triangular systems.
// With beta = 0 what C held is never read, so it may be uninitialised.

#include <cblas.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "annulus/base/check.h"
#include "annulus/ops/transpose.h"

namespace annulus::kernels {

inline constexpr int64_t kMaxBlasCount = std::numeric_limits<blasint>::max();

// A stored matrix; row i starts at data + i * stride.
template <typename T>
struct BlasOperand {
  const T* data = nullptr;
  int64_t stride = 0;
  Transpose transpose = Transpose::kNo;
};

// a: [m, k] after its transpose   b: [k, n] after its transpose   c: [m, n]
template <typename T>
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;
  T alpha = 1;
  BlasOperand<T> a, b;
  T beta = 0;
  T* c = nullptr;
  int64_t c_stride = 0;
};

inline blasint BlasCount(int64_t n) {
  ANNULUS_CHECK(0 <= n && n <= kMaxBlasCount) << "BLAS count " << n;
  return static_cast<blasint>(n);
}
// CBLAS demands positive leading dimensions, also of matrices without columns.
inline blasint BlasStride(int64_t n) { return BlasCount(std::max<int64_t>(n, 1)); }

inline CBLAS_TRANSPOSE BlasTranspose(Transpose transpose) {
  return transpose == Transpose::kYes ? CblasTrans : CblasNoTrans;
}

template <typename T>
void Gemm(const GemmArgs<T>& g) {
  if (g.m == 0 || g.n == 0) return;
  const auto count = BlasCount;
  const auto stride = BlasStride;
  const auto op = [](const BlasOperand<T>& x) { return BlasTranspose(x.transpose); };
  if constexpr (std::is_same_v<T, double>) {
    cblas_dgemm(CblasRowMajor, op(g.a), op(g.b), count(g.m), count(g.n), count(g.k), g.alpha, g.a.data,
                stride(g.a.stride), g.b.data, stride(g.b.stride), g.beta, g.c, stride(g.c_stride));
  } else {
    static_assert(std::is_same_v<T, float>);
    cblas_sgemm(CblasRowMajor, op(g.a), op(g.b), count(g.m), count(g.n), count(g.k), g.alpha, g.a.data,
                stride(g.a.stride), g.b.data, stride(g.b.stride), g.beta, g.c, stride(g.c_stride));
  }
}

// x = op(I + lower)^-1 x.   lower: [n, n], read below the diagonal only   x: [n, columns]
template <typename T>
void SolveUnitLower(int64_t n, int64_t columns, const BlasOperand<T>& lower, T* x, int64_t x_stride) {
  if (n == 0 || columns == 0) return;
  const auto solve = [&](auto trsm) {
    trsm(CblasRowMajor, CblasLeft, CblasLower, BlasTranspose(lower.transpose), CblasUnit, BlasCount(n),
         BlasCount(columns), T{1}, lower.data, BlasStride(lower.stride), x, BlasStride(x_stride));
  };
  if constexpr (std::is_same_v<T, double>) {
    solve(cblas_dtrsm);
  } else {
    static_assert(std::is_same_v<T, float>);
    solve(cblas_strsm);
  }
}

}  // namespace annulus::kernels
