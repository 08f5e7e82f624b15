#pragma once

// Vectors of N elements that move by accesses of up to 16 bytes; arithmetic on them is in f32.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace annulus::kernels {

// Elements of one 16-byte access.
template <typename T>
inline constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements in registers as they lie in memory: half the registers of their f32 values for bf16.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T value[N];
  __device__ float operator[](int i) const { return ToFloat(value[i]); }
};

// p is aligned to the pack's size, at most 16 bytes. The words are copied as integers because the compiler
// does not merge accesses to arrays of bf16 by itself.
template <int N, typename T>
__device__ Pack<T, N> LoadPack(const T* p) {
  Pack<T, N> pack;
  constexpr int kBytes = N * static_cast<int>(sizeof(T));
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 words = reinterpret_cast<const uint4*>(p)[i];
      memcpy(reinterpret_cast<char*>(&pack) + 16 * i, &words, 16);
    }
  } else if constexpr (kBytes == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(p);
    memcpy(&pack, &words, 8);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.value[i] = p[i];
  }
  return pack;
}

template <int N, typename T>
__device__ void StorePack(const Pack<T, N>& pack, T* p) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T));
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      uint4 words;
      memcpy(&words, reinterpret_cast<const char*>(&pack) + 16 * i, 16);
      reinterpret_cast<uint4*>(p)[i] = words;
    }
  } else if constexpr (kBytes == 8) {
    uint2 words;
    memcpy(&words, &pack, 8);
    *reinterpret_cast<uint2*>(p) = words;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = pack.value[i];
  }
}

// The same for what is not read again soon: the first that L2 gives up.
template <int N, typename T>
__device__ void StorePackStreaming(const Pack<T, N>& pack, T* p) {
  if constexpr (N * sizeof(T) == 16) {
    uint4 words;
    memcpy(&words, &pack, 16);
    __stcs(reinterpret_cast<uint4*>(p), words);
  } else {
    StorePack<N>(pack, p);
  }
}

// Rounds to nearest even; bf16 two at a time, one instruction a pair.
template <typename T, int N>
__device__ Pack<T, N> PackOf(const float (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
      pack.value[i] = pair.x;
      pack.value[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.value[i] = FromFloat<T>(x[i]);
  }
  return pack;
}

template <typename T>
__device__ T WarpSum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// On 16 bytes.
inline bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace annulus::kernels
