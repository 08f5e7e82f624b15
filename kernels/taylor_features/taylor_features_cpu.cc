#include <cmath>

#include "kernels/common/heads_cpu.h"
#include "kernels/taylor_features/taylor_features_kernels.h"

namespace annulus::kernels {
namespace {

// Factors of the terms of first and second order.
template <typename T>
struct Factors {
  explicit Factors(int64_t dim)
      : first(static_cast<T>(1 / std::sqrt(std::sqrt(static_cast<double>(dim))))),
        second(static_cast<T>(1 / std::sqrt(2.0 * static_cast<double>(dim)))) {}
  T first, second;
};

}  // namespace

template <typename T>
absl::Status TaylorFeaturesForward(CpuTag, Context& ctx, ConstHeadsRef x, HeadsRef y) {
  const int64_t d = x.dim;
  const Factors<T> factors(d);
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(x, row, item, head);
    T* out = HeadAt<T>(y, row, item, head);
    out[0] = T{1};
    for (int64_t i = 0; i < d; ++i) {
      out[1 + i] = in[i] * factors.first;
      T* products = out + 1 + d + i * d;
      const T factor = in[i] * factors.second;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) products[j] = factor * in[j];
    }
  });
  return absl::OkStatus();
}

// The term x_i x_j gives x_j to dx_i and x_i to dx_j.
template <typename T>
absl::Status TaylorFeaturesBackward(CpuTag, Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx) {
  const int64_t d = x.dim;
  const Factors<T> factors(d);
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(x, row, item, head);
    const T* up = HeadAt<T>(dy, row, item, head);
    T* out = HeadAt<T>(dx, row, item, head);
    for (int64_t i = 0; i < d; ++i) out[i] = up[1 + i] * factors.first;
    for (int64_t i = 0; i < d; ++i) {
      const T* products = up + 1 + d + i * d;
      const T factor = in[i] * factors.second;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < d; ++j) sum += products[j] * in[j];
      out[i] += sum * factors.second;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) out[j] += factor * products[j];
    }
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status NormaliseForward(CpuTag, Context& ctx, ConstHeadsRef num, double eps, HeadsRef o) {
  ForEachHead(ctx, o, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(num, row, item, head);
    T* out = HeadAt<T>(o, row, item, head);
    const T inverse = T{1} / (in[o.dim] + static_cast<T>(eps));
#pragma omp simd
    for (int64_t i = 0; i < o.dim; ++i) out[i] = in[i] * inverse;
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status NormaliseBackward(CpuTag, Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_,
                               HeadsRef dnum) {
  const int64_t d = do_.dim;
  ForEachHead(ctx, do_, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(num, row, item, head);
    const T* up = HeadAt<T>(do_, row, item, head);
    T* out = HeadAt<T>(dnum, row, item, head);
    const T inverse = T{1} / (in[d] + static_cast<T>(eps));
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < d; ++i) dot += up[i] * in[i];
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] = up[i] * inverse;
    out[d] = -dot * inverse * inverse;
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status AppendOnes(CpuTag, Context& ctx, ConstHeadsRef x, HeadsRef y) {
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    T* out = HeadAt<T>(y, row, item, head);
    std::copy_n(HeadAt<T>(x, row, item, head), x.dim, out);
    out[x.dim] = T{1};
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status DropLastColumn(CpuTag, Context& ctx, ConstHeadsRef y, HeadsRef x) {
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    std::copy_n(HeadAt<T>(y, row, item, head), x.dim, HeadAt<T>(x, row, item, head));
  });
  return absl::OkStatus();
}

template absl::Status TaylorFeaturesForward<float>(CpuTag, Context&, ConstHeadsRef, HeadsRef);
template absl::Status TaylorFeaturesForward<double>(CpuTag, Context&, ConstHeadsRef, HeadsRef);
template absl::Status TaylorFeaturesBackward<float>(CpuTag, Context&, ConstHeadsRef, ConstHeadsRef, HeadsRef);
template absl::Status TaylorFeaturesBackward<double>(CpuTag, Context&, ConstHeadsRef, ConstHeadsRef,
                                                     HeadsRef);
template absl::Status NormaliseForward<float>(CpuTag, Context&, ConstHeadsRef, double, HeadsRef);
template absl::Status NormaliseForward<double>(CpuTag, Context&, ConstHeadsRef, double, HeadsRef);
template absl::Status NormaliseBackward<float>(CpuTag, Context&, ConstHeadsRef, double, ConstHeadsRef,
                                               HeadsRef);
template absl::Status NormaliseBackward<double>(CpuTag, Context&, ConstHeadsRef, double, ConstHeadsRef,
                                                HeadsRef);
template absl::Status AppendOnes<float>(CpuTag, Context&, ConstHeadsRef, HeadsRef);
template absl::Status AppendOnes<double>(CpuTag, Context&, ConstHeadsRef, HeadsRef);
template absl::Status DropLastColumn<float>(CpuTag, Context&, ConstHeadsRef, HeadsRef);
template absl::Status DropLastColumn<double>(CpuTag, Context&, ConstHeadsRef, HeadsRef);

}  // namespace annulus::kernels
