#include <cmath>

#include "kernels/adamw/adamw_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status AdamWUpdate(CpuTag, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  // Every factor is formed in double: 1 - beta2 loses digits in f32.
  const double step = static_cast<double>(hyper.step);
  const T beta1 = static_cast<T>(hyper.beta1), other1 = static_cast<T>(1 - hyper.beta1);
  const T beta2 = static_cast<T>(hyper.beta2), other2 = static_cast<T>(1 - hyper.beta2);
  const T step_size = static_cast<T>(hyper.lr / (1 - std::pow(hyper.beta1, step)));
  const T root_correction = static_cast<T>(1 / std::sqrt(1 - std::pow(hyper.beta2, step)));
  const T keep = static_cast<T>(1 - hyper.lr * hyper.weight_decay);
  const T eps = static_cast<T>(hyper.eps), gradient_scale = static_cast<T>(hyper.gradient_scale);
  const T* grad = tensors.grad.data<T>();
  T* param = tensors.param.data<T>();
  T* m = tensors.m.data<T>();
  T* v = tensors.v.data<T>();
  const int64_t n = tensors.grad.elements();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = gradient_scale * grad[i];
    m[i] = beta1 * m[i] + other1 * g;
    v[i] = beta2 * v[i] + other2 * (g * g);
    param[i] = keep * param[i] - step_size * m[i] / (std::sqrt(v[i]) * root_correction + eps);
  }
  return absl::OkStatus();
}

template absl::Status AdamWUpdate<float>(CpuTag, const AdamWHyper&, const AdamWTensors&);
template absl::Status AdamWUpdate<double>(CpuTag, const AdamWHyper&, const AdamWTensors&);

}  // namespace annulus::kernels
