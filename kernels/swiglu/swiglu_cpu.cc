#include "kernels/common/vector_math.h"
#include "kernels/swiglu/swiglu_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status SwigluForward(CpuTag, Context&, ConstTensorRef gate_up, TensorRef h) {
  const int64_t tokens = h.dim(0), d = h.dim(1);
  for (int64_t t = 0; t < tokens; ++t) {
    const T* gate = gate_up.data<T>() + t * 2 * d;
    const T* up = gate + d;
    T* out = h.data<T>() + t * d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] = gate[i] / (T{1} + Exp(-gate[i])) * up[i];
  }
  return absl::OkStatus();
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g)
template <typename T>
absl::Status SwigluBackward(CpuTag, Context&, ConstTensorRef gate_up, ConstTensorRef dh, TensorRef dgate_up) {
  const int64_t tokens = dh.dim(0), d = dh.dim(1);
  for (int64_t t = 0; t < tokens; ++t) {
    const T* gate = gate_up.data<T>() + t * 2 * d;
    const T* up = gate + d;
    const T* dout = dh.data<T>() + t * d;
    T* dgate = dgate_up.data<T>() + t * 2 * d;
    T* dup = dgate + d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const T sigmoid = T{1} / (T{1} + Exp(-gate[i]));
      const T silu = gate[i] * sigmoid;
      const T slope = sigmoid + silu * (T{1} - sigmoid);
      dgate[i] = dout[i] * up[i] * slope;
      dup[i] = dout[i] * silu;
    }
  }
  return absl::OkStatus();
}

template absl::Status SwigluForward<float>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status SwigluForward<double>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status SwigluBackward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status SwigluBackward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
