#pragma once

// What the timings of the attention kernels share.

#include "cuda/attention_mma/device_arrays.h"

namespace annulus::testing {

static __global__ void FillRandom(bf16* x, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h = (static_cast<uint64_t>(i) + (uint64_t{seed} << 40)) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
    h *= 0xBF58476D1CE4E5B9ull;
    h ^= h >> 32;
    // Sum of four uniforms, variance one.
    float sum = -2;
    for (int b = 0; b < 4; ++b) sum += static_cast<float>((h >> (16 * b)) & 0xFFFF) / 65536;
    x[i] = __float2bfloat16(sum * 1.7320508f);
  }
}

template <typename Fn>
double MedianSeconds(Fn&& fn, int repeats) {
  cudaEvent_t start, stop;
  CUDA(cudaEventCreate(&start));
  CUDA(cudaEventCreate(&stop));
  fn();
  std::vector<float> ms(Size(repeats));
  for (float& t : ms) {
    CUDA(cudaEventRecord(start));
    fn();
    CUDA(cudaEventRecord(stop));
    CUDA(cudaEventSynchronize(stop));
    CUDA(cudaEventElapsedTime(&t, start, stop));
  }
  CUDA(cudaGetLastError());
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2] * 1e-3;
}

}  // namespace annulus::testing
