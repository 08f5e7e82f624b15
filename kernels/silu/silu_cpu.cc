#include "kernels/common/vector_math.h"
#include "kernels/silu/silu_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status SiluForward(CpuTag, Context&, ConstMatrixRef x, MatrixRef y) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const T* in = static_cast<const T*>(x.data) + t * x.stride;
    T* out = static_cast<T*>(y.data) + t * y.stride;
#pragma omp simd
    for (int64_t i = 0; i < x.cols; ++i) out[i] = in[i] / (T{1} + Exp(-in[i]));
  }
  return absl::OkStatus();
}

// silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x)
template <typename T>
absl::Status SiluBackward(CpuTag, Context&, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const T* in = static_cast<const T*>(x.data) + t * x.stride;
    const T* dout = static_cast<const T*>(dy.data) + t * dy.stride;
    T* din = static_cast<T*>(dx.data) + t * dx.stride;
#pragma omp simd
    for (int64_t i = 0; i < x.cols; ++i) {
      const T sigmoid = T{1} / (T{1} + Exp(-in[i]));
      din[i] = dout[i] * sigmoid * (T{1} + in[i] * (T{1} - sigmoid));
    }
  }
  return absl::OkStatus();
}

// On CPUs the accumulator dtype is the compute dtype.
template <typename T>
absl::Status SigmoidForward(CpuTag, Context&, ConstMatrixRef x, TensorRef y) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const T* in = static_cast<const T*>(x.data) + t * x.stride;
    T* out = y.data<T>() + t * x.cols;
    for (int64_t i = 0; i < x.cols; ++i) out[i] = T{1} / (T{1} + Exp(-in[i]));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status SigmoidBackward(CpuTag, Context&, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx) {
  for (int64_t t = 0; t < dx.rows; ++t) {
    const T* out = y.data<T>() + t * dx.cols;
    const T* dout = dy.data<T>() + t * dx.cols;
    T* din = static_cast<T*>(dx.data) + t * dx.stride;
    for (int64_t i = 0; i < dx.cols; ++i) din[i] = dout[i] * out[i] * (T{1} - out[i]);
  }
  return absl::OkStatus();
}

template absl::Status SigmoidForward<float>(CpuTag, Context&, ConstMatrixRef, TensorRef);
template absl::Status SigmoidForward<double>(CpuTag, Context&, ConstMatrixRef, TensorRef);
template absl::Status SigmoidBackward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, MatrixRef);
template absl::Status SigmoidBackward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, MatrixRef);
template absl::Status SiluForward<float>(CpuTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluForward<double>(CpuTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<float>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<double>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);

}  // namespace annulus::kernels
