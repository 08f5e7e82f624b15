#include <cmath>

#include "kernels/adamw/adamw_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
void Update(const AdamWHyper& hyper, const AdamWTensors& tensors, double scale) {
  // Every factor is formed in double: 1 - beta2 loses digits in f32.
  const double step = static_cast<double>(hyper.step);
  const T beta1 = static_cast<T>(hyper.beta1), other1 = static_cast<T>(1 - hyper.beta1);
  const T beta2 = static_cast<T>(hyper.beta2), other2 = static_cast<T>(1 - hyper.beta2);
  const T step_size = static_cast<T>(hyper.lr / (1 - std::pow(hyper.beta1, step)));
  const T root_correction = static_cast<T>(1 / std::sqrt(1 - std::pow(hyper.beta2, step)));
  const T keep = static_cast<T>(1 - hyper.lr * hyper.weight_decay);
  const T eps = static_cast<T>(hyper.eps), gradient_scale = static_cast<T>(scale);
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
}

template <typename From, typename To>
void Round(const From* x, int64_t n, To* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<To>(x[i]);
}

}  // namespace

absl::Status AdamWUpdate(CpuTag, Context&, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  const double scale = *tensors.gradient_scale.data<double>();
  if (std::isnan(scale)) return absl::OkStatus();
  const TensorRef &param = tensors.param, &copy = tensors.copy;
  VisitFloat(param.dtype(), [&]<class T>() {
    Update<T>(hyper, tensors, scale);
    if (!copy.defined()) return;
    VisitFloat(copy.dtype(), [&]<class C>() { Round(param.data<T>(), param.elements(), copy.data<C>()); });
  });
  return absl::OkStatus();
}

}  // namespace annulus::kernels
