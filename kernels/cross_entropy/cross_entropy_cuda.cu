// One CTA a row, two passes: log-sum-exp online, then the gradient. At a vocabulary of 128K in bf16 the rows
// in work, one a SM, are 34 MB and the second pass reads them from L2 (50 MB on H100). Floor: a logit read
// once and written once; that is 1/17 of the time of its three products at d = 4096.

#include "kernels/common/vector.cuh"
#include "kernels/cross_entropy/cross_entropy_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 1024;
constexpr int kUnroll = 4;  // vectors in flight per thread
constexpr float kLog2E = 1.4426950408889634f;

// sum of 2^(x - maximum) over values x seen so far. Logits are taken times log2(e), one multiply-add each.
struct SumExp {
  float maximum = -INFINITY, sum = 0;

  __device__ void Merge(const SumExp& other) {
    const float top = fmaxf(maximum, other.maximum);
    if (top == -INFINITY) return;  // nothing seen yet on either side
    sum = sum * exp2f(maximum - top) + other.sum * exp2f(other.maximum - top);
    maximum = top;
  }
  template <typename T, int N>
  __device__ void Add(const Pack<T, N>& logits) {
    float top = logits[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, logits[i]);
    top *= kLog2E;
    if (top > maximum) {
      sum *= exp2f(maximum - top);
      maximum = top;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2f(fmaf(logits[i], kLog2E, -maximum));
  }
};

// The total over the CTA, in every thread.
__device__ SumExp BlockMerge(SumExp x) {
  __shared__ SumExp warp[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    SumExp other;
    other.maximum = __shfl_xor_sync(0xffffffffu, x.maximum, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, x.sum, offset);
    x.Merge(other);
  }
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  SumExp total;
  for (int w = 0; w < kThreads / 32; ++w) total.Merge(warp[w]);
  return total;
}

template <int N, typename T>
__device__ SumExp RowSumExp(const T* row, int64_t vocab) {
  SumExp sum;
  const int64_t vectors = vocab / N;
  for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
    Pack<T, N> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < vectors) pack[u] = LoadPack<N>(row + (first + u * kThreads) * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < vectors) sum.Add(pack[u]);
    }
  }
  const int64_t tail = vectors * N + threadIdx.x;
  if (tail < vocab) sum.Add(LoadPack<1>(row + tail));
  return BlockMerge(sum);
}

template <typename Grad>
__device__ void ZeroRow(Grad* row, int64_t vocab) {
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) row[i] = FromFloat<Grad>(0.0f);
}

// Round by round of a few vectors a thread. A gradient never lies above its own logit, but may lie on
// another's: when Grad is narrower, all of a round's logits are in registers before its first gradient is
// written.
template <int N, typename Logit, typename Grad>
__device__ void WriteGradient(Logit* row, int64_t vocab, float offset, float factor) {
  Grad* gradient = reinterpret_cast<Grad*>(row);
  const int64_t vectors = (vocab + N - 1) / N;  // the row's stride covers the last one
  for (int64_t base = 0; base < vectors; base += kThreads * kUnroll) {
    Pack<Logit, N> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = base + u * kThreads + threadIdx.x;
      if (vector < vectors) pack[u] = LoadPack<N>(static_cast<const Logit*>(row + vector * N));
    }
    if constexpr (sizeof(Grad) < sizeof(Logit)) __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = base + u * kThreads + threadIdx.x;
      if (vector >= vectors) continue;
      float value[N];
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = factor * exp2f(fmaf(pack[u][i], kLog2E, -offset));
      StorePack<N>(PackOf<Grad>(value), gradient + vector * N);
    }
  }
}

template <typename Logit, typename Grad, bool kGradient>
__global__ void __launch_bounds__(kThreads) RowKernel(const CudaCrossEntropyArgs<Logit> args) {
  constexpr int N = kVectorElements<Logit>;
  const int64_t t = blockIdx.x;
  Logit* row = args.logits + t * args.stride;
  Grad* gradient = reinterpret_cast<Grad*>(row);
  const int32_t target = args.targets[t];
  if (target < 0) {
    if (kGradient) ZeroRow(gradient, args.vocab);
    if (threadIdx.x == 0) args.row_loss[t] = 0;
    return;
  }
  const float target_logit = ToFloat(row[target]);  // before BlockMerge's barrier, so before any gradient
  const SumExp total = RowSumExp<N>(static_cast<const Logit*>(row), args.vocab);
  const float log2_sum = total.maximum + log2f(total.sum);
  const float log2_gap = log2_sum - target_logit * kLog2E;
  if (threadIdx.x == 0) args.row_loss[t] = log2_gap / kLog2E;
  if constexpr (kGradient) {
    const float scale = static_cast<float>(args.scale);
    WriteGradient<N, Logit, Grad>(row, args.vocab, total.maximum, scale / total.sum);
    __syncthreads();
    if (threadIdx.x == 0) {
      // From the f32 probability, not from the rounded gradient.
      const float probability = exp2f(-log2_gap);
      gradient[target] = FromFloat<Grad>(scale * (probability - 1.0f));
    }
  }
}

__global__ void __launch_bounds__(kThreads) AddSumKernel(const float* x, int64_t count, double* total) {
  __shared__ double warp_sum[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += x[i];
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = WarpSum(warp_sum[threadIdx.x]);
  if (threadIdx.x == 0) *total += sum;
}

template <typename Logit, typename Grad, bool kGradient>
cudaError_t Launch(const CudaCrossEntropyArgs<Logit>& args, cudaStream_t stream) {
  if (args.stride % 8 != 0 || !Aligned(args.logits) || args.tokens > INT32_MAX) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  RowKernel<Logit, Grad, kGradient><<<static_cast<uint32_t>(args.tokens), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

template <typename Logit, typename Grad>
cudaError_t CudaCrossEntropy(const CudaCrossEntropyArgs<Logit>& args, cudaStream_t stream) {
  static_assert(sizeof(Grad) <= sizeof(Logit));
  return Launch<Logit, Grad, true>(args, stream);
}
template <typename Logit>
cudaError_t CudaCrossEntropyLoss(const CudaCrossEntropyArgs<Logit>& args, cudaStream_t stream) {
  return Launch<Logit, Logit, false>(args, stream);
}

cudaError_t CudaAddSum(const float* x, int64_t count, double* sum, cudaStream_t stream) {
  AddSumKernel<<<1, kThreads, 0, stream>>>(x, count, sum);
  return cudaGetLastError();
}

template cudaError_t CudaCrossEntropy<float, float>(const CudaCrossEntropyArgs<float>&, cudaStream_t);
template cudaError_t CudaCrossEntropy<float, __nv_bfloat16>(const CudaCrossEntropyArgs<float>&, cudaStream_t);
template cudaError_t CudaCrossEntropy<__nv_bfloat16, __nv_bfloat16>(
    const CudaCrossEntropyArgs<__nv_bfloat16>&, cudaStream_t);
template cudaError_t CudaCrossEntropyLoss<float>(const CudaCrossEntropyArgs<float>&, cudaStream_t);
template cudaError_t CudaCrossEntropyLoss<__nv_bfloat16>(const CudaCrossEntropyArgs<__nv_bfloat16>&,
                                                         cudaStream_t);

}  // namespace annulus::kernels
