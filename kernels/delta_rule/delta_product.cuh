#pragma once

// Products of many small matrices as in batched_product.cuh, on tensor cores in f32 arithmetic.

#include "kernels/common/vector.cuh"
#include "kernels/delta_rule/split_product.cuh"

namespace annulus::kernels {

inline constexpr int kDeltaTile = 64, kDeltaDepth = 32, kDeltaThreads = 256;

// Warp w holds rows 16 (w / 2) ... + 15 and columns 32 (w % 2) ... + 31 of a tile.
template <typename Op>
__global__ void __launch_bounds__(kDeltaThreads, 2)
    DeltaProductKernel(const __grid_constant__ Op op, int column_tiles) {
  // Rows apart such that a warp's fragments are on all banks.
  constexpr int kLeftStride = kDeltaDepth + 4, kRightStride = kDeltaTile + 8;
  __shared__ float left[kDeltaTile * kLeftStride], right[kDeltaDepth * kRightStride];
  const auto block = op.At(blockIdx.x);
  const int row = static_cast<int>(blockIdx.y) / column_tiles * kDeltaTile;
  const int column = static_cast<int>(blockIdx.y) % column_tiles * kDeltaTile;
  const int m = static_cast<int>(block.m), n = static_cast<int>(block.n), k = static_cast<int>(block.k);
  if (row >= m || column >= n) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 32;
  ProductPart sums[2] = {};
  for (int depth = 0; depth < k; depth += kDeltaDepth) {
    // Elements outside are read from inside: with nothing to branch on, several reads are on their way at
    // once.
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = thread; first < kDeltaTile * kDeltaDepth; first += kAtOnce * kDeltaThreads) {
      float lefts[kAtOnce], rights[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int at = first + e * kDeltaThreads;
        const int i = row + at / kDeltaDepth, l = depth + at % kDeltaDepth;
        const int r = depth + at / kDeltaTile, j = column + at % kDeltaTile;
        lefts[e] = block.Left(min(i, m - 1), min(l, k - 1));
        rights[e] = block.Right(min(r, k - 1), min(j, n - 1));
        if (i >= m || l >= k) lefts[e] = 0;
        if (j >= n || r >= k) rights[e] = 0;
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int at = first + e * kDeltaThreads;
        left[at / kDeltaDepth * kLeftStride + at % kDeltaDepth] = lefts[e];
        right[at / kDeltaTile * kRightStride + at % kDeltaTile] = rights[e];
      }
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ProductPart part = WarpProduct({left, kLeftStride, 1}, {right, kRightStride, 1}, warp_row,
                                           warp_column + 16 * half, kDeltaDepth);
      sums[half].Add(1, part);
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half].ForEach([&](int i, int j, float& sum) {
      const int to_row = row + warp_row + i, to_column = column + warp_column + 16 * half + j;
      if (to_row < m && to_column < n) block.Store(to_row, to_column, sum);
    });
  }
}

// Products [0, count), of at most m x n each.
template <typename Op>
cudaError_t LaunchDeltaProducts(const Op& op, int64_t count, int64_t m, int64_t n, cudaStream_t stream) {
  const int64_t tiles = CeilDiv(m, kDeltaTile) * CeilDiv(n, kDeltaTile);
  if (count == 0 || tiles == 0) return cudaSuccess;
  if (count > INT32_MAX || tiles > UINT16_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(count), static_cast<uint32_t>(tiles));
  DeltaProductKernel<<<grid, kDeltaThreads, 0, stream>>>(op, static_cast<int>(CeilDiv(n, kDeltaTile)));
  return cudaGetLastError();
}

}  // namespace annulus::kernels
