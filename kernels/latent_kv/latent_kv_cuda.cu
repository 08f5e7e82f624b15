// A CTA takes one token. Floors, elements moved per token: pack H (nope + v) + rope read and H (nope + rope +
// v) written; unpack the reverse. The rotary part of a token is read from L1 by all heads, and its gradient
// is summed in two steps: threads over the heads of their slice, then over slices, both in order.

#include "kernels/common/vector.cuh"
#include "kernels/latent_kv/latent_kv_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256;

// Sizes in vectors of N elements.
struct Sizes {
  uint32_t heads, nope, rope, v;
};

template <int N, typename T>
__global__ void __launch_bounds__(kThreads)
    PackKernel(const CudaPackLatentKvArgs<T> args, const Sizes sizes) {
  const int64_t token = blockIdx.x;
  const T* const up = args.up + token * args.up_stride;
  const T* const k_rope = args.k_rope + token * args.rope_stride;
  T* const kv = args.kv + token * args.kv_stride;
  const uint32_t k_dim = sizes.nope + sizes.rope, up_dim = sizes.nope + sizes.v;
  const uint32_t keys = sizes.heads * k_dim, all = keys + sizes.heads * sizes.v;
  for (uint32_t i = threadIdx.x; i < all; i += kThreads) {
    const T* from = nullptr;
    if (i < keys) {
      const uint32_t head = i / k_dim, at = i - head * k_dim;
      from = at < sizes.nope ? up + (head * up_dim + at) * N : k_rope + (at - sizes.nope) * N;
    } else {
      const uint32_t head = (i - keys) / sizes.v, at = i - keys - head * sizes.v;
      from = up + (head * up_dim + sizes.nope + at) * N;
    }
    StorePack<N>(LoadPack<N>(from), kv + i * N);
  }
}

// Elements of a pack in another type.
template <typename To, typename From, int N>
__device__ Pack<To, N> Converted(const Pack<From, N>& from) {
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = from[i];
  return PackOf<To>(values);
}

template <int N, typename From, typename T>
__device__ void CopyUp(const CudaUnpackLatentKvArgs<From, T>& args, const Sizes& sizes, const From* dkv,
                       T* dup) {
  const uint32_t k_dim = sizes.nope + sizes.rope, up_dim = sizes.nope + sizes.v;
  for (uint32_t i = threadIdx.x; i < sizes.heads * up_dim; i += kThreads) {
    const uint32_t head = i / up_dim, at = i - head * up_dim;
    const uint32_t from =
        at < sizes.nope ? head * k_dim + at : sizes.heads * k_dim + head * sizes.v + at - sizes.nope;
    StorePack<N>(Converted<T>(LoadPack<N>(dkv + from * N)), dup + i * N);
  }
}

// sums: kThreads packs of N. As many slices of the heads as there are threads for.
template <int N, typename From>
__device__ void SumOverHeads(const Sizes& sizes, const From* dkv, LatentRopeWrite write, float* sums,
                             float* dk_rope) {
  const uint32_t k_dim = sizes.nope + sizes.rope;
  for (uint32_t first = 0; first < sizes.rope; first += kThreads) {
    const uint32_t columns = min(sizes.rope - first, uint32_t{kThreads}), slices = kThreads / columns;
    const uint32_t slice = threadIdx.x / columns, column = threadIdx.x - slice * columns;
    if (slice < slices) {
      float sum[N] = {};
      for (uint32_t head = slice; head < sizes.heads; head += slices) {
        const Pack<From, N> part = LoadPack<N>(dkv + (head * k_dim + sizes.nope + first + column) * N);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += part[i];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i * kThreads + threadIdx.x] = sum[i];
    }
    __syncthreads();
    for (uint32_t element = threadIdx.x; element < columns * N; element += kThreads) {
      const uint32_t of = element / N, i = element - of * N;
      float sum = 0;
      for (uint32_t s = 0; s < slices; ++s) sum += sums[i * kThreads + s * columns + of];
      float* const to = dk_rope + (first + of) * N + i;
      *to = write == LatentRopeWrite::kAdd ? *to + sum : sum;
    }
    __syncthreads();
  }
}

template <int N, typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    UnpackKernel(const CudaUnpackLatentKvArgs<From, T> args, const Sizes sizes) {
  __shared__ float sums[N * kThreads];
  const int64_t token = blockIdx.x;
  const From* const dkv = args.dkv + token * args.dkv_stride;
  CopyUp<N>(args, sizes, dkv, args.dup + token * args.dup_stride);
  SumOverHeads<N>(sizes, dkv, args.write, sums, args.dk_rope + token * args.rope_stride);
}

Sizes InVectors(const CudaLatentSizes& sizes, int n) {
  return {.heads = static_cast<uint32_t>(sizes.heads),
          .nope = static_cast<uint32_t>(sizes.nope / n),
          .rope = static_cast<uint32_t>(sizes.rope / n),
          .v = static_cast<uint32_t>(sizes.v / n)};
}
bool FitVectors(const CudaLatentSizes& sizes, int n) {
  return sizes.nope % n == 0 && sizes.rope % n == 0 && sizes.v % n == 0;
}
// Offsets inside of a token are 32 bits.
bool FitsGrid(const CudaLatentSizes& sizes) {
  return sizes.tokens <= INT32_MAX && sizes.heads * (sizes.nope + sizes.rope + sizes.v) <= INT32_MAX;
}

}  // namespace

template <typename T>
cudaError_t CudaPackLatentKv(const CudaPackLatentKvArgs<T>& args, cudaStream_t stream) {
  const CudaLatentSizes& sizes = args.sizes;
  if (!FitsGrid(sizes)) return cudaErrorInvalidValue;
  if (sizes.tokens == 0 || sizes.heads == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const bool fit = FitVectors(sizes, kN) && Aligned(args.up) && Aligned(args.k_rope) && Aligned(args.kv) &&
                   args.up_stride % kN == 0 && args.rope_stride % kN == 0 && args.kv_stride % kN == 0;
  const auto grid = static_cast<uint32_t>(sizes.tokens);
  if (fit) {
    PackKernel<kN><<<grid, kThreads, 0, stream>>>(args, InVectors(sizes, kN));
  } else {
    PackKernel<1><<<grid, kThreads, 0, stream>>>(args, InVectors(sizes, 1));
  }
  return cudaGetLastError();
}

template <typename From, typename T>
cudaError_t CudaUnpackLatentKv(const CudaUnpackLatentKvArgs<From, T>& args, cudaStream_t stream) {
  const CudaLatentSizes& sizes = args.sizes;
  if (!FitsGrid(sizes)) return cudaErrorInvalidValue;
  if (sizes.tokens == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const bool fit = FitVectors(sizes, kN) && Aligned(args.dkv) && Aligned(args.dup) &&
                   args.dkv_stride % kN == 0 && args.dup_stride % kN == 0;
  const auto grid = static_cast<uint32_t>(sizes.tokens);
  if (fit) {
    UnpackKernel<kN><<<grid, kThreads, 0, stream>>>(args, InVectors(sizes, kN));
  } else {
    UnpackKernel<1><<<grid, kThreads, 0, stream>>>(args, InVectors(sizes, 1));
  }
  return cudaGetLastError();
}

template cudaError_t CudaPackLatentKv(const CudaPackLatentKvArgs<float>&, cudaStream_t);
template cudaError_t CudaPackLatentKv(const CudaPackLatentKvArgs<__nv_bfloat16>&, cudaStream_t);
template cudaError_t CudaUnpackLatentKv(const CudaUnpackLatentKvArgs<float, float>&, cudaStream_t);
template cudaError_t CudaUnpackLatentKv(const CudaUnpackLatentKvArgs<float, __nv_bfloat16>&, cudaStream_t);
template cudaError_t CudaUnpackLatentKv(const CudaUnpackLatentKvArgs<__nv_bfloat16, __nv_bfloat16>&,
                                        cudaStream_t);

}  // namespace annulus::kernels
