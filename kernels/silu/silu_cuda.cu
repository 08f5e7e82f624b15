// Floors, elements moved per element of x: forward 2, backward 3.

#include "kernels/common/rows.cuh"
#include "kernels/silu/silu_cuda.h"

namespace annulus::kernels {
namespace {

__device__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
struct ForwardOp {
  SiluShape shape;
  const T* x;
  T* y;
  template <int N>
  using State = Pack<T, N>;
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    return LoadPack<N>(x + row * shape.x_stride + column);
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = state[i] * Sigmoid(state[i]);
    StorePack<N>(PackOf<T>(out), y + row * shape.y_stride + column);
  }
};

template <typename T>
struct BackwardOp {
  SiluShape shape;
  const T* x;
  const T* dy;
  T* dx;
  template <int N>
  struct State {
    Pack<T, N> x, dy;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    return {LoadPack<N>(x + row * shape.x_stride + column), LoadPack<N>(dy + row * shape.dy_stride + column)};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = state.x[i], sigmoid = Sigmoid(value);
      out[i] = state.dy[i] * sigmoid * (1.0f + value * (1.0f - sigmoid));
    }
    StorePack<N>(PackOf<T>(out), dx + row * shape.y_stride + column);
  }
};

template <typename T>
struct SigmoidForwardOp {
  SiluShape shape;
  const T* x;
  float* y;
  template <int N>
  using State = Pack<T, N>;
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    return LoadPack<N>(x + row * shape.x_stride + column);
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = Sigmoid(state[i]);
    StorePack<N>(PackOf<float>(out), y + row * shape.columns + column);
  }
};

template <typename T>
struct SigmoidBackwardOp {
  SiluShape shape;
  const float* y;
  const float* dy;
  T* dx;
  template <int N>
  struct State {
    Pack<float, N> y, dy;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    const int64_t at = row * shape.columns + column;
    return {LoadPack<N>(y + at), LoadPack<N>(dy + at)};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = state.dy[i] * state.y[i] * (1.0f - state.y[i]);
    StorePack<N>(PackOf<T>(out), dx + row * shape.y_stride + column);
  }
};

}  // namespace

template <typename T>
cudaError_t CudaSiluForward(const SiluShape& shape, const T* x, T* y, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = shape.columns % kN == 0 && shape.x_stride % kN == 0 && shape.y_stride % kN == 0 &&
                   Aligned(x) && Aligned(y);
  return LaunchRows<kN, 2>(shape.rows, shape.columns, fit, ForwardOp<T>{shape, x, y}, stream);
}

template <typename T>
cudaError_t CudaSiluBackward(const SiluShape& shape, const T* x, const T* dy, T* dx, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = shape.columns % kN == 0 && shape.x_stride % kN == 0 && shape.y_stride % kN == 0 &&
                   shape.dy_stride % kN == 0 && Aligned(x) && Aligned(dy) && Aligned(dx);
  return LaunchRows<kN, 2>(shape.rows, shape.columns, fit, BackwardOp<T>{shape, x, dy, dx}, stream);
}

// A column for each head: few, and of any number.
template <typename T>
cudaError_t CudaSigmoidForward(const SiluShape& shape, const T* x, float* y, cudaStream_t stream) {
  return LaunchRows<1, 2>(shape.rows, shape.columns, true, SigmoidForwardOp<T>{shape, x, y}, stream);
}

template <typename T>
cudaError_t CudaSigmoidBackward(const SiluShape& shape, const float* y, const float* dy, T* dx,
                                cudaStream_t stream) {
  return LaunchRows<1, 2>(shape.rows, shape.columns, true, SigmoidBackwardOp<T>{shape, y, dy, dx}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                      \
  template cudaError_t CudaSiluForward<T>(const SiluShape&, const T*, T*, cudaStream_t);            \
  template cudaError_t CudaSiluBackward<T>(const SiluShape&, const T*, const T*, T*, cudaStream_t); \
  template cudaError_t CudaSigmoidForward<T>(const SiluShape&, const T*, float*, cudaStream_t);     \
  template cudaError_t CudaSigmoidBackward<T>(const SiluShape&, const float*, const float*, T*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
