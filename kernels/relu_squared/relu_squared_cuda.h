#pragma once

// CUDA kernels of annulus/ops/relu_squared.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// x, h: [elements]; h may be x.
template <typename T>
cudaError_t CudaReluSquaredForward(int64_t elements, const T* x, T* h, cudaStream_t stream);

// dx is overwritten; it may be dh.
template <typename T>
cudaError_t CudaReluSquaredBackward(int64_t elements, const T* x, const T* dh, T* dx, cudaStream_t stream);

}  // namespace annulus::kernels
