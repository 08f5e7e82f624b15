#pragma once

// CUDA kernel of annulus/ops/rope.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// Turns pairs (first + i, first + i + pairs) of every head of x in place by positions[row] * radians[i], and
// scales them; `inverse` turns back, and scales as well.
//   x: [rows, batch, heads, dim], heads and dim contiguous   positions: [rows], device memory
template <typename T>
struct CudaRopeArgs {
  int64_t rows = 0, batch = 1, heads = 0, dim = 0;
  int64_t first = 0, pairs = 0;  // dim = first + 2 * pairs
  int64_t row_stride = 0, batch_stride = 0;
  T* x = nullptr;
  const int64_t* positions = nullptr;
  const double* radians = nullptr;  // [pairs], host memory
  float scale = 1;
  bool inverse = false;
};
inline constexpr int64_t kCudaRopeMaxPairs = 256;
template <typename T>
cudaError_t CudaRope(const CudaRopeArgs<T>& args, cudaStream_t stream);

}  // namespace annulus::kernels
