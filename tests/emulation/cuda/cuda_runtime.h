#pragma once

// What of CUDA's headers kernels under emulation (block.h) use.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "emulation/block.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static  // of kernels with one resident block
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define threadIdx (::annulus::emulation::ThreadIndex())
#define blockIdx (::annulus::emulation::BlockIndex())
#define blockDim (::annulus::emulation::BlockSize())
#define gridDim (::annulus::emulation::GridSize())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
using cudaStream_t = struct EmulatedStream*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text =
      error == cudaErrorLaunchFailure ? annulus::emulation::LastFailure() : "error " + std::to_string(error);
  return text.c_str();
}

// Device memory is the host's.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
template <typename T>
cudaError_t cudaMalloc(T** data, size_t bytes) {
  *data = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return *data != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
inline cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(data, value, bytes);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? annulus::emulation::Multiprocessors()
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

using std::max;
using std::min;

inline void __syncthreads() { annulus::emulation::SyncBlock(); }
inline void __syncwarp() { annulus::emulation::MeetWarp("__syncwarp", 0); }
[[noreturn]] inline void __trap() { annulus::emulation::Fail("__trap"); }
// Not always ready, or a thread that polls would keep what it waits for from running.
inline void __nanosleep(unsigned) {
  annulus::emulation::WaitUntil(
      "__nanosleep", [] { return annulus::emulation::Idle() || annulus::emulation::Random(8) == 0; });
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Of whole warps.
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return annulus::emulation::MeetWarp("__shfl_sync", x)[lane % 32];
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return annulus::emulation::MeetWarp("__shfl_xor_sync", x)[annulus::emulation::Lane() ^ mask];
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const T* all = annulus::emulation::MeetWarp("__shfl_up_sync", x);
  const int lane = annulus::emulation::Lane();
  return all[lane < distance ? lane : lane - distance];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const int* all = annulus::emulation::MeetWarp("__ballot_sync", predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(all[lane] != 0) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline int __reduce_min_sync(unsigned, int x) {
  const int* all = annulus::emulation::MeetWarp("__reduce_min_sync", x);
  return *std::min_element(all, all + 32);
}
inline int __reduce_max_sync(unsigned, int x) {
  const int* all = annulus::emulation::MeetWarp("__reduce_max_sync", x);
  return *std::max_element(all, all + 32);
}

template <typename T>
T atomicAdd(T* at, T x) {
  return std::exchange(*at, *at + x);
}
template <typename T>
T atomicMax(T* at, T x) {
  return std::exchange(*at, std::max(*at, x));
}

#include "emulation/intrinsics.h"
