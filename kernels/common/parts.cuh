#pragma once

// Sums over rows that CTAs leave in parts, and their sum in an order fixed by the shape.

#include "kernels/common/vector.cuh"

namespace annulus::kernels {

// sum[c] += sum over parts of scratch[part, c]
struct PartSums {
  const float* scratch = nullptr;
  int64_t columns = 0;
  float* sum = nullptr;
};

// 32 columns a CTA, 32 threads a column; the CTAs of the first sums, then those of the second.
static __global__ void __launch_bounds__(1024)
    AddPartsKernel(const PartSums first, const PartSums second, int64_t parts) {
  __shared__ float sums[32][33];
  const int64_t first_blocks = (first.columns + 31) / 32;
  const bool is_first = blockIdx.x < first_blocks;
  const PartSums of{is_first ? first.scratch : second.scratch, is_first ? first.columns : second.columns,
                    is_first ? first.sum : second.sum};
  const int64_t begin = (blockIdx.x - (is_first ? 0 : first_blocks)) * 32;
  const int64_t column = begin + threadIdx.x;
  float part_sum = 0;
  if (column < of.columns) {
    for (int64_t part = threadIdx.y; part < parts; part += 32)
      part_sum += of.scratch[part * of.columns + column];
  }
  sums[threadIdx.x][threadIdx.y] = part_sum;
  __syncthreads();
  part_sum = WarpSum(sums[threadIdx.y][threadIdx.x]);  // warp y holds column y of this CTA
  const int64_t own = begin + threadIdx.y;
  if (threadIdx.x == 0 && own < of.columns) of.sum[own] += part_sum;
}

inline cudaError_t AddParts(int64_t parts, const PartSums& first, const PartSums& second,
                            cudaStream_t stream) {
  const int64_t blocks = CeilDiv(first.columns, 32) + CeilDiv(second.columns, 32);
  if (blocks == 0) return cudaSuccess;
  AddPartsKernel<<<static_cast<uint32_t>(blocks), dim3(32, 32), 0, stream>>>(first, second, parts);
  return cudaGetLastError();
}
inline cudaError_t AddParts(const float* scratch, int64_t parts, int64_t columns, float* sum,
                            cudaStream_t stream) {
  return AddParts(parts, {scratch, columns, sum}, {}, stream);
}

// Of the calling thread's device.
inline int SmCount() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace annulus::kernels
