#pragma once

// Sums over rows that CTAs leave in parts, and their sum in an order fixed by the shape.

#include "kernels/common/vector.cuh"

namespace annulus::kernels {

// sum[c] += sum over parts of scratch[part, c]: 32 columns a CTA, 32 threads a column.
static __global__ void __launch_bounds__(1024)
    AddPartsKernel(const float* __restrict__ scratch, int64_t parts, int64_t columns,
                   float* __restrict__ sum) {
  __shared__ float sums[32][33];
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float part_sum = 0;
  if (column < columns) {
    for (int64_t part = threadIdx.y; part < parts; part += 32) part_sum += scratch[part * columns + column];
  }
  sums[threadIdx.x][threadIdx.y] = part_sum;
  __syncthreads();
  part_sum = WarpSum(sums[threadIdx.y][threadIdx.x]);  // warp y holds column y of this CTA
  const int64_t own = int64_t{blockIdx.x} * 32 + threadIdx.y;
  if (threadIdx.x == 0 && own < columns) sum[own] += part_sum;
}

inline cudaError_t AddParts(const float* scratch, int64_t parts, int64_t columns, float* sum,
                            cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  AddPartsKernel<<<static_cast<uint32_t>(CeilDiv(columns, 32)), dim3(32, 32), 0, stream>>>(scratch, parts,
                                                                                           columns, sum);
  return cudaGetLastError();
}

// Of the calling thread's device.
inline int SmCount() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace annulus::kernels
