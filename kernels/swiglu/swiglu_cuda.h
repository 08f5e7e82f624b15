#pragma once

// CUDA kernels of annulus/ops/swiglu.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// gate_up: [tokens, 2 * d_ff], gate first   h: [tokens, d_ff]   h = silu(gate) * up
template <typename T>
cudaError_t CudaSwigluForward(int64_t tokens, int64_t d_ff, const T* gate_up, T* h, cudaStream_t stream);

// dgate_up is overwritten; it may be gate_up.
template <typename T>
cudaError_t CudaSwigluBackward(int64_t tokens, int64_t d_ff, const T* gate_up, const T* dh, T* dgate_up,
                               cudaStream_t stream);

}  // namespace annulus::kernels
