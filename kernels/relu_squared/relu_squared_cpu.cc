#include "kernels/relu_squared/relu_squared_kernels.h"

namespace annulus::kernels {
namespace {

// Not max(x, 0), which hides NaN from the loss, where training stops on it.
template <typename T>
T Relu(T x) {
  return x < 0 ? T{0} : x;
}

}  // namespace

template <typename T>
absl::Status ReluSquaredForward(CpuTag, Context&, ConstTensorRef x, TensorRef h) {
  const T* in = x.data<T>();
  T* out = h.data<T>();
  for (int64_t i = 0; i < x.elements(); ++i) {
    const T relu = Relu(in[i]);
    out[i] = relu * relu;
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status ReluSquaredBackward(CpuTag, Context&, ConstTensorRef x, ConstTensorRef dh, TensorRef dx) {
  const T* in = x.data<T>();
  const T* dout = dh.data<T>();
  T* out = dx.data<T>();
  for (int64_t i = 0; i < x.elements(); ++i) out[i] = 2 * Relu(in[i]) * dout[i];
  return absl::OkStatus();
}

template absl::Status ReluSquaredForward<float>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status ReluSquaredForward<double>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status ReluSquaredBackward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status ReluSquaredBackward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef,
                                                  TensorRef);

}  // namespace annulus::kernels
