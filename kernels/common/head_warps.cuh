#pragma once

// Kernels in which a warp takes one head of one token: op(row, item, head, lane).

#include "kernels/common/heads_shape_cuda.h"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {

// First element of a head of `dim` elements.
template <typename T>
__device__ T* HeadAt(const StridedRows<T>& x, int64_t dim, int64_t row, int64_t item, int64_t head) {
  return x.data + row * x.row_stride + item * x.batch_stride + head * dim;
}

inline constexpr int kHeadWarps = 8;  // of a CTA

template <typename Op>
__global__ void __launch_bounds__(32 * kHeadWarps) HeadWarpsKernel(const HeadsShape shape, const Op op) {
  const int64_t index = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32;
  if (index >= shape.rows * shape.batch * shape.heads) return;
  const int64_t token = index / shape.heads;
  op(token / shape.batch, token % shape.batch, index % shape.heads, static_cast<int>(threadIdx.x % 32));
}

template <typename Op>
cudaError_t LaunchHeadWarps(const HeadsShape& shape, const Op& op, cudaStream_t stream) {
  const int64_t blocks = CeilDiv(shape.rows * shape.batch * shape.heads, kHeadWarps);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  HeadWarpsKernel<<<static_cast<uint32_t>(blocks), 32 * kHeadWarps, 0, stream>>>(shape, op);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
