#pragma once

// Row-major matrix product on the CPU, C = alpha op(A) op(B) + beta C, over CBLAS.
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

template <typename T>
void Gemm(const GemmArgs<T>& g) {
  if (g.m == 0 || g.n == 0) return;
  // CBLAS demands positive leading dimensions, also of matrices without columns.
  const auto count = [](int64_t n) {
    ANNULUS_CHECK(0 <= n && n <= kMaxBlasCount) << "BLAS count " << n;
    return static_cast<blasint>(n);
  };
  const auto stride = [&](int64_t n) { return count(std::max<int64_t>(n, 1)); };
  const auto op = [](const BlasOperand<T>& x) {
    return x.transpose == Transpose::kYes ? CblasTrans : CblasNoTrans;
  };
  if constexpr (std::is_same_v<T, double>) {
    cblas_dgemm(CblasRowMajor, op(g.a), op(g.b), count(g.m), count(g.n), count(g.k), g.alpha, g.a.data,
                stride(g.a.stride), g.b.data, stride(g.b.stride), g.beta, g.c, stride(g.c_stride));
  } else {
    static_assert(std::is_same_v<T, float>);
    cblas_sgemm(CblasRowMajor, op(g.a), op(g.b), count(g.m), count(g.n), count(g.k), g.alpha, g.a.data,
                stride(g.a.stride), g.b.data, stride(g.b.stride), g.beta, g.c, stride(g.c_stride));
  }
}

}  // namespace annulus::kernels
