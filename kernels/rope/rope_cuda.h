#pragma once

// CUDA kernel of annulus/ops/rope.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// Turns pairs (i, i + dim / 2) of every head of x in place by positions[row] * theta^(-2i / dim); `inverse`
// turns back, which is also the gradient.
//   x: [rows, batch, heads, dim], heads and dim contiguous   positions: [rows], device memory
template <typename T>
struct CudaRopeArgs {
  int64_t rows = 0, batch = 1, heads = 0, dim = 0;
  int64_t row_stride = 0, batch_stride = 0;
  T* x = nullptr;
  const int64_t* positions = nullptr;
  double theta = 10000;
  bool inverse = false;
};
// dim: even, at most kCudaRopeMaxDim.
inline constexpr int64_t kCudaRopeMaxDim = 512;
template <typename T>
cudaError_t CudaRope(const CudaRopeArgs<T>& args, cudaStream_t stream);

}  // namespace annulus::kernels
