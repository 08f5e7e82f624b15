#pragma once

// CUDA kernels of annulus/ops/mamba_gates.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// raw, draw: [tokens, heads] with rows `stride` and `draw_stride` apart   dt, a, ddt, da: [tokens, heads]
template <typename T>
struct CudaMambaGatesArgs {
  int64_t tokens = 0, heads = 0, stride = 0;
  float low = 0, high = 0;  // high: +inf where there is no limit
  const T* raw = nullptr;
  const float* bias = nullptr;
  const float* a_log = nullptr;
};
template <typename T>
cudaError_t CudaMambaGatesForward(const CudaMambaGatesArgs<T>& args, float* dt, float* a,
                                  cudaStream_t stream);

// dbias and da_log are added to, in an order fixed by the shape.
//   ddt: null: 0   scratch: CudaMambaGatesScratch floats
template <typename T>
struct CudaMambaGatesGradients {
  const float* ddt = nullptr;
  const float* da = nullptr;
  T* draw = nullptr;
  int64_t draw_stride = 0;
  float* dbias = nullptr;
  float* da_log = nullptr;
  float* scratch = nullptr;
};
template <typename T>
cudaError_t CudaMambaGatesBackward(const CudaMambaGatesArgs<T>& args,
                                   const CudaMambaGatesGradients<T>& gradients, cudaStream_t stream);
int64_t CudaMambaGatesScratch(int64_t tokens, int64_t heads);

}  // namespace annulus::kernels
