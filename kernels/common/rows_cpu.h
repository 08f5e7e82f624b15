#pragma once

// Products of matrices whose rows are strided, among them lower triangular ones [n, n], such as those between
// the rows of a chunk of a recurrence: computed in panels of rows, so that most of the upper half is left
// out.

#include "annulus/ops/write.h"
#include "kernels/common/blas.h"
#include "kernels/common/heads_cpu.h"

namespace annulus::kernels {

template <typename T>
struct StridedRows {
  T* data = nullptr;
  int64_t stride = 0;

  T* at(int64_t row) const { return data + row * stride; }
  StridedRows From(int64_t row) const { return {at(row), stride}; }
  operator StridedRows<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, stride};
  }
};

// Head `head` of an item's rows from `first` on.
template <typename T, typename Byte>
auto HeadRows(const BasicHeadsRef<Byte>& x, int64_t first, int64_t item, int64_t head) {
  auto* data = HeadAt<T>(x, first, item, head);
  // Strides mean nothing where there is one row.
  return StridedRows<std::remove_pointer_t<decltype(data)>>{data, std::max(x.row_stride, x.dim)};
}

template <typename T>
StridedRows<T> RowsScratch(Context& ctx, int64_t rows, int64_t columns) {
  return {ScratchElements<T>(ctx, rows * columns), columns};
}

// to[row] = factor(row) * x[row], for rows [0, n).
template <typename T, typename Factor>
void ScaleRows(int64_t n, int64_t columns, const Factor& factor, const StridedRows<const T>& x,
               const StridedRows<T>& to) {
  for (int64_t r = 0; r < n; ++r) {
    const T f = factor(r);
    const T* in = x.at(r);
    T* out = to.at(r);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) out[i] = f * in[i];
  }
}

// to[row] += factor(row) * x[row]
template <typename T, typename Factor>
void AddScaledRows(int64_t n, int64_t columns, const Factor& factor, const StridedRows<const T>& x,
                   const StridedRows<T>& to) {
  for (int64_t r = 0; r < n; ++r) {
    const T f = factor(r);
    const T* in = x.at(r);
    T* out = to.at(r);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) out[i] += f * in[i];
  }
}

template <typename T>
T DotRow(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// c: [m, n]   a and b as they enter the product: [m, k], [k, n]
struct ProductDims {
  int64_t m = 0, n = 0, k = 0;
};
struct ProductForm {
  Transpose a = Transpose::kNo, b = Transpose::kNo;
  Write write = Write::kOverwrite;
};

// c (=, +=) a b
template <typename T>
void Multiply(const ProductDims& d, const StridedRows<const T>& a, const StridedRows<const T>& b,
              const ProductForm& form, const StridedRows<T>& c) {
  Gemm<T>({.m = d.m,
           .n = d.n,
           .k = d.k,
           .a = {a.data, a.stride, form.a},
           .b = {b.data, b.stride, form.b},
           .beta = form.write == Write::kAccumulate ? T{1} : T{0},
           .c = c.data,
           .c_stride = c.stride});
}

inline constexpr int64_t kPanelRows = 64;

// Calls fn(begin, end) with panels of [0, n).
template <typename Fn>
void ForEachPanel(int64_t n, Fn&& fn) {
  for (int64_t begin = 0; begin < n; begin += kPanelRows) fn(begin, std::min(begin + kPanelRows, n));
}

// lower[t, s] = a_t . b_s for s below the end of t's panel.   a, b: [n, k]
template <typename T>
void LowerProduct(int64_t n, int64_t k, const StridedRows<const T>& a, const StridedRows<const T>& b,
                  const StridedRows<T>& lower) {
  ForEachPanel(n, [&](int64_t begin, int64_t end) {
    Multiply<T>({.m = end - begin, .n = end, .k = k}, a.From(begin), b, {.b = Transpose::kYes},
                lower.From(begin));
  });
}

struct LowerDims {
  int64_t n = 0, columns = 0;
};

// y (=, +=) lower x.   x, y: [n, columns]; lower: zeros above the diagonal inside panels
template <typename T>
void LowerTimes(const LowerDims& d, const StridedRows<const T>& lower, const StridedRows<const T>& x,
                Write write, const StridedRows<T>& y) {
  ForEachPanel(d.n, [&](int64_t begin, int64_t end) {
    Multiply<T>({.m = end - begin, .n = d.columns, .k = end}, lower.From(begin), x, {.write = write},
                y.From(begin));
  });
}

// y (=, +=) lower^T x
template <typename T>
void LowerTransposedTimes(const LowerDims& d, const StridedRows<const T>& lower,
                          const StridedRows<const T>& x, Write write, const StridedRows<T>& y) {
  ForEachPanel(d.n, [&](int64_t begin, int64_t end) {
    const StridedRows<const T> block{lower.at(begin) + begin, lower.stride};
    Multiply<T>({.m = end - begin, .n = d.columns, .k = d.n - begin}, block, x.From(begin),
                {.a = Transpose::kYes, .write = write}, y.From(begin));
  });
}

}  // namespace annulus::kernels
