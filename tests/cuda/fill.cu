#include "cuda/harness.h"

namespace annulus::testing {
namespace {

__device__ uint32_t Hash(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull, x ^= x >> 33;
  return static_cast<uint32_t>(x);
}
template <typename T>
__global__ void FillKernel(T* x, int64_t n, float scale, uint32_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float u = (Hash(2 * i + (uint64_t{seed} << 40)) + 1.0f) * 2.3283064e-10f;
    const float v = Hash(2 * i + 1 + (uint64_t{seed} << 40)) * 2.3283064e-10f;
    x[i] = static_cast<T>(scale * sqrtf(-2 * logf(fminf(u, 1.0f))) * cospif(2 * v));
  }
}

__global__ void BusyKernel(uint64_t nanoseconds) {
  const auto now = [] {
    uint64_t time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
  };
  const uint64_t start = now();
  while (now() - start < nanoseconds) {
  }
}

}  // namespace

void KeepBusy(double microseconds) {
  BusyKernel<<<1, 1, 0, g_stream>>>(static_cast<uint64_t>(microseconds * 1000));
}

void FillNormal(Bf16* x, int64_t n, float scale, uint32_t seed) {
  FillKernel<<<1024, 256, 0, g_stream>>>(x, n, scale, seed);
}
void FillNormal(float* x, int64_t n, float scale, uint32_t seed) {
  FillKernel<<<1024, 256, 0, g_stream>>>(x, n, scale, seed);
}

}  // namespace annulus::testing
