#pragma once

// CUDA kernels of annulus/ops/latent_kv.h. Strides are between tokens, in elements.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

struct CudaLatentSizes {
  int64_t tokens = 0, heads = 0, nope = 0, rope = 0, v = 0;
};

// kv = [n_h | k_rope of every head | v_h], up = [n_h | v_h of every head]
template <typename T>
struct CudaPackLatentKvArgs {
  CudaLatentSizes sizes;
  const T* up = nullptr;
  const T* k_rope = nullptr;
  T* kv = nullptr;
  int64_t up_stride = 0, rope_stride = 0, kv_stride = 0;
};
template <typename T>
cudaError_t CudaPackLatentKv(const CudaPackLatentKvArgs<T>& args, cudaStream_t stream);

enum class LatentRopeWrite { kOverwrite, kAdd };

// dk_rope (=, +=) the sum over heads, always in the same order.
template <typename From, typename T>
struct CudaUnpackLatentKvArgs {
  CudaLatentSizes sizes;
  const From* dkv = nullptr;
  T* dup = nullptr;
  float* dk_rope = nullptr;
  int64_t dkv_stride = 0, dup_stride = 0, rope_stride = 0;
  LatentRopeWrite write = LatentRopeWrite::kOverwrite;
};
template <typename From, typename T>
cudaError_t CudaUnpackLatentKv(const CudaUnpackLatentKvArgs<From, T>& args, cudaStream_t stream);

}  // namespace annulus::kernels
