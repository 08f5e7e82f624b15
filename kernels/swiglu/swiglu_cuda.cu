// Floors, elements moved per element of h: forward 3, backward 5.

#include "kernels/common/rows.cuh"
#include "kernels/swiglu/swiglu_cuda.h"

namespace annulus::kernels {
namespace {

// bf16 keeps 8 bits: the special-function units' 21 suffice there, and f32 gets the library's.
template <typename T>
__device__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

template <typename T>
struct ForwardOp {
  int64_t d_ff;
  const T* gate_up;
  T* h;
  template <int N>
  struct State {
    Pack<T, N> gate, up;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    const T* gate = gate_up + row * 2 * d_ff + column;
    return {LoadPack<N>(gate), LoadPack<N>(gate + d_ff)};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = state.gate[i] * Sigmoid<T>(state.gate[i]) * state.up[i];
    StorePack<N>(PackOf<T>(out), h + row * d_ff + column);
  }
};

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g)
template <typename T>
struct BackwardOp {
  int64_t d_ff;
  const T* gate_up;
  const T* dh;
  T* dgate_up;
  template <int N>
  struct State {
    Pack<T, N> gate, up, dh;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    const T* gate = gate_up + row * 2 * d_ff + column;
    return {LoadPack<N>(gate), LoadPack<N>(gate + d_ff), LoadPack<N>(dh + row * d_ff + column)};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float dgate[N], dup[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gate = state.gate[i], sigmoid = Sigmoid<T>(gate), silu = gate * sigmoid;
      dgate[i] = state.dh[i] * state.up[i] * (sigmoid + silu * (1.0f - sigmoid));
      dup[i] = state.dh[i] * silu;
    }
    T* out = dgate_up + row * 2 * d_ff + column;
    StorePack<N>(PackOf<T>(dgate), out);
    StorePack<N>(PackOf<T>(dup), out + d_ff);
  }
};

}  // namespace

template <typename T>
cudaError_t CudaSwigluForward(int64_t tokens, int64_t d_ff, const T* gate_up, T* h, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = d_ff % kN == 0 && Aligned(gate_up) && Aligned(h);
  return LaunchRows<kN, 2>(tokens, d_ff, fit, ForwardOp<T>{d_ff, gate_up, h}, stream);
}

template <typename T>
cudaError_t CudaSwigluBackward(int64_t tokens, int64_t d_ff, const T* gate_up, const T* dh, T* dgate_up,
                               cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = d_ff % kN == 0 && Aligned(gate_up) && Aligned(dh) && Aligned(dgate_up);
  return LaunchRows<kN, 2>(tokens, d_ff, fit, BackwardOp<T>{d_ff, gate_up, dh, dgate_up}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                             \
  template cudaError_t CudaSwigluForward<T>(int64_t, int64_t, const T*, T*, cudaStream_t); \
  template cudaError_t CudaSwigluBackward<T>(int64_t, int64_t, const T*, const T*, T*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
