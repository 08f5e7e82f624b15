#pragma once

// CUDA kernels of annulus/ops/silu.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// Rows of `columns` elements, each operand with its own stride between rows.
struct SiluShape {
  int64_t rows = 0, columns = 0;
  int64_t x_stride = 0, dy_stride = 0, y_stride = 0;
};

template <typename T>
cudaError_t CudaSiluForward(const SiluShape& shape, const T* x, T* y, cudaStream_t stream);
template <typename T>
cudaError_t CudaSiluBackward(const SiluShape& shape, const T* x, const T* dy, T* dx, cudaStream_t stream);

// y and dy without gaps between rows.
template <typename T>
cudaError_t CudaSigmoidForward(const SiluShape& shape, const T* x, float* y, cudaStream_t stream);
template <typename T>
cudaError_t CudaSigmoidBackward(const SiluShape& shape, const float* y, const float* dy, T* dx,
                                cudaStream_t stream);

}  // namespace annulus::kernels
