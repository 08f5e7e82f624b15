// Floors, elements moved per element of h: forward 2, backward 3.

#include "kernels/common/rows.cuh"
#include "kernels/relu_squared/relu_squared_cuda.h"

namespace annulus::kernels {
namespace {

// Not fmaxf, which hides NaN from the loss, where training stops on it.
__device__ float Relu(float x) { return x < 0.0f ? 0.0f : x; }

template <typename T>
struct ForwardOp {
  const T* x;
  T* h;
  template <int N>
  using State = Pack<T, N>;
  template <int N>
  __device__ State<N> Load(int64_t, int64_t column) const {
    return LoadPack<N>(x + column);
  }
  template <int N>
  __device__ void Store(int64_t, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = Relu(state[i]) * Relu(state[i]);
    StorePack<N>(PackOf<T>(out), h + column);
  }
};

template <typename T>
struct BackwardOp {
  const T* x;
  const T* dh;
  T* dx;
  template <int N>
  struct State {
    Pack<T, N> x, dh;
  };
  template <int N>
  __device__ State<N> Load(int64_t, int64_t column) const {
    return {LoadPack<N>(x + column), LoadPack<N>(dh + column)};
  }
  template <int N>
  __device__ void Store(int64_t, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = 2.0f * Relu(state.x[i]) * state.dh[i];
    StorePack<N>(PackOf<T>(out), dx + column);
  }
};

}  // namespace

template <typename T>
cudaError_t CudaReluSquaredForward(int64_t elements, const T* x, T* h, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  return LaunchRows<kN, 2>(1, elements, Aligned(x) && Aligned(h), ForwardOp<T>{x, h}, stream);
}

template <typename T>
cudaError_t CudaReluSquaredBackward(int64_t elements, const T* x, const T* dh, T* dx, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = Aligned(x) && Aligned(dh) && Aligned(dx);
  return LaunchRows<kN, 2>(1, elements, fit, BackwardOp<T>{x, dh, dx}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                         \
  template cudaError_t CudaReluSquaredForward<T>(int64_t, const T*, T*, cudaStream_t); \
  template cudaError_t CudaReluSquaredBackward<T>(int64_t, const T*, const T*, T*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
