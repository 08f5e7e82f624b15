#include <cmath>

#include "kernels/rms_norm/rms_norm_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
T InverseRms(const T* x, int64_t d, double eps) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += x[i] * x[i];
  return T{1} / std::sqrt(sum / static_cast<T>(d) + static_cast<T>(eps));
}

}  // namespace

template <typename T>
absl::Status RmsNormForward(CpuTag, Context&, ConstTensorRef x, ConstTensorRef w, double eps, TensorRef y) {
  const int64_t tokens = x.dim(0), d = x.dim(1);
  const T* weight = w.data<T>();
  for (int64_t t = 0; t < tokens; ++t) {
    const T* in = x.data<T>() + t * d;
    T* out = y.data<T>() + t * d;
    const T inverse = InverseRms(in, d, eps);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] = weight[i] * (in[i] * inverse);
  }
  return absl::OkStatus();
}

// With r the inverse norm:  dx = r w dy - x r^3 / d sum(w dy x)     dw = sum over tokens of dy x r
template <typename T>
absl::Status RmsNormBackward(CpuTag, Context&, ConstTensorRef x, ConstTensorRef w, double eps,
                             const RmsNormGradients& gradients) {
  const int64_t tokens = x.dim(0), d = x.dim(1);
  const T* weight = w.data<T>();
  T* dw = gradients.dw.data<T>();
  for (int64_t t = 0; t < tokens; ++t) {
    const T* in = x.data<T>() + t * d;
    const T* dy = gradients.dy.data<T>() + t * d;
    T* dx = gradients.dx.data<T>() + t * d;
    const T inverse = InverseRms(in, d, eps);
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < d; ++i) dot += weight[i] * dy[i] * in[i];
    const T along = dot * inverse * inverse / static_cast<T>(d);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      dx[i] += inverse * (weight[i] * dy[i] - along * in[i]);
      dw[i] += dy[i] * (in[i] * inverse);
    }
  }
  return absl::OkStatus();
}

template absl::Status RmsNormForward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                            TensorRef);
template absl::Status RmsNormForward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                             TensorRef);
template absl::Status RmsNormBackward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                             const RmsNormGradients&);
template absl::Status RmsNormBackward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                              const RmsNormGradients&);

}  // namespace annulus::kernels
