#include <cmath>

#include "kernels/common/heads_cpu.h"
#include "kernels/delta_rule/delta_rule_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
T Dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
T InverseNorm(const T* x, int64_t n, double eps) {
  return T{1} / std::sqrt(Dot(x, x, n) + static_cast<T>(eps));
}

}  // namespace

template <typename T>
absl::Status L2NormForward(CpuTag, Context& ctx, ConstHeadsRef x, double eps, HeadsRef y) {
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(x, row, item, head);
    T* out = HeadAt<T>(y, row, item, head);
    const T r = InverseNorm(in, x.dim, eps);
#pragma omp simd
    for (int64_t i = 0; i < x.dim; ++i) out[i] = in[i] * r;
  });
  return absl::OkStatus();
}

// dx = r (dy - x r^2 sum(dy x))
template <typename T>
absl::Status L2NormBackward(CpuTag, Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy,
                            HeadsRef dx) {
  ForEachHead(ctx, x, [&](int64_t row, int64_t item, int64_t head) {
    const T* in = HeadAt<T>(x, row, item, head);
    const T* up = HeadAt<T>(dy, row, item, head);
    T* out = HeadAt<T>(dx, row, item, head);
    const T r = InverseNorm(in, x.dim, eps), along = Dot(in, up, x.dim) * r * r;
#pragma omp simd
    for (int64_t i = 0; i < x.dim; ++i) out[i] = r * (up[i] - along * in[i]);
  });
  return absl::OkStatus();
}

template absl::Status L2NormForward<float>(CpuTag, Context&, ConstHeadsRef, double, HeadsRef);
template absl::Status L2NormForward<double>(CpuTag, Context&, ConstHeadsRef, double, HeadsRef);
template absl::Status L2NormBackward<float>(CpuTag, Context&, ConstHeadsRef, double, ConstHeadsRef, HeadsRef);
template absl::Status L2NormBackward<double>(CpuTag, Context&, ConstHeadsRef, double, ConstHeadsRef,
                                             HeadsRef);

}  // namespace annulus::kernels
