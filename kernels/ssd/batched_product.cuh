#pragma once

// Products of many small matrices in f32, whose elements are computed as they are read and written:
//
//   struct Op {
//     struct Block {                              // one product
//       int64_t m, n, k;
//       __device__ float Left(int64_t i, int64_t l) const;     // i < m, l < k
//       __device__ float Right(int64_t l, int64_t j) const;
//       __device__ void Store(int64_t i, int64_t j, float sum) const;
//     };
//     __device__ Block At(int64_t index) const;
//   };
//
// Sums are taken over kProductDepth at a time and then over those: chains of thousands would lose digits.

#include "kernels/common/vector.cuh"

namespace annulus::kernels {

inline constexpr int kProductTile = 64, kProductDepth = 16, kProductThreads = 256;

// Thread (x, y) of 16 x 16 holds rows y + 16 i and columns x + 16 j of a tile.
template <typename Op>
__global__ void __launch_bounds__(kProductThreads)
    BatchedProductKernel(const __grid_constant__ Op op, int64_t first, int column_tiles) {
  __shared__ float left[kProductDepth][kProductTile + 1], right[kProductDepth][kProductTile + 1];
  const auto block = op.At(first + blockIdx.x);
  const int64_t row = int64_t{blockIdx.y / column_tiles} * kProductTile;
  const int64_t column = int64_t{blockIdx.y % column_tiles} * kProductTile;
  if (row >= block.m || column >= block.n) return;
  const int thread = static_cast<int>(threadIdx.x), x = thread % 16, y = thread / 16;
  float sum[4][4] = {};
  for (int64_t depth = 0; depth < block.k; depth += kProductDepth) {
    for (int e = thread; e < kProductTile * kProductDepth; e += kProductThreads) {
      const int64_t i = row + e / kProductDepth, l = depth + e % kProductDepth;
      left[e % kProductDepth][e / kProductDepth] = i < block.m && l < block.k ? block.Left(i, l) : 0;
      const int64_t j = column + e % kProductTile, r = depth + e / kProductTile;
      right[e / kProductTile][e % kProductTile] = j < block.n && r < block.k ? block.Right(r, j) : 0;
    }
    __syncthreads();
    float part[4][4] = {};
#pragma unroll
    for (int l = 0; l < kProductDepth; ++l) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] += left[l][y + 16 * i] * right[l][x + 16 * j];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t to_row = row + y + 16 * i, to_column = column + x + 16 * j;
      if (to_row < block.m && to_column < block.n) block.Store(to_row, to_column, sum[i][j]);
    }
  }
}

// Products [first, first + count), of at most m x n each.
template <typename Op>
cudaError_t LaunchProducts(const Op& op, int64_t first, int64_t count, int64_t m, int64_t n,
                           cudaStream_t stream) {
  const int64_t tiles = CeilDiv(m, kProductTile) * CeilDiv(n, kProductTile);
  if (count == 0 || tiles == 0) return cudaSuccess;
  if (count > INT32_MAX || tiles > UINT16_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(count), static_cast<uint32_t>(tiles));
  BatchedProductKernel<<<grid, kProductThreads, 0, stream>>>(op, first,
                                                             static_cast<int>(CeilDiv(n, kProductTile)));
  return cudaGetLastError();
}

}  // namespace annulus::kernels
