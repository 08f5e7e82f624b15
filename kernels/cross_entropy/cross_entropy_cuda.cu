// A cluster of CTAs a row, each with its slice of the logits in shared memory: a logit is read once and its
// gradient written once, 6 bytes from f32 to bf16, which is the floor. (From global memory a second pass
// would read again: at a vocabulary of 128K the rows in work do not fit in L2.) That is 1/12 of the time of
// the three products at d = 4096.
//
//   copy of the slice, its (max, sum) by warps -> to every CTA of the row -> cluster barrier
//   -> (max, sum) of the row -> gradient of the slice
//
// Of a part of the vocabulary the first three steps end with the row's stats, and a second kernel copies the
// slice again for the gradient: 4 bytes more.
//
// After the barrier every logit of the row is on chip, so a narrower gradient may overwrite any of them. What
// takes time besides memory is what a row waits for: so all copies of a slice are under way at once, sums are
// sent before the barrier, not fetched behind it, and the row's target is waited for last.

#include <cooperative_groups.h>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/cross_entropy/cross_entropy_cuda.h"

namespace annulus::kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxCluster = 8;  // portable
// Two CTAs of an SM, three where slices are short: some load while another stores. (With shorter slices in
// larger clusters rows wait for more of their CTAs: 72 KiB is 10% slower at a vocabulary of 50K.)
constexpr int64_t kSliceBytes = 110 << 10;
constexpr int N = 4;  // logits of a vector
constexpr int64_t kVectorBytes = N * sizeof(float);
static_assert(kCudaCrossEntropyMaxVocab * sizeof(float) <= kMaxCluster * (224 << 10),
              "a CTA can have 227 KiB");

using Logits = Pack<float, N>;

// sum of 2^(x - maximum) over values x seen so far. Logits are taken times log2(e), one multiply-add each.
struct SumExp {
  float maximum = -INFINITY, sum = 0;

  // The sum were the maximum `top`, which is not below it. Both are -inf where nothing was seen, or NaN
  // alone.
  __device__ float SumAt(float top) const { return maximum == top ? sum : sum * Exp2(maximum - top); }

  __device__ void Merge(const SumExp& other) {
    const float top = fmaxf(maximum, other.maximum);
    *this = {top, SumAt(top) + other.SumAt(top)};
  }
  __device__ void Add(const Logits& logits) {
    float top = logits[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, logits[i]);
    top *= kLog2E;
    if (top > maximum) {
      sum *= Exp2(maximum - top);
      maximum = top;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum += Exp2(fmaf(logits[i], kLog2E, -maximum));
  }
};

// The total over the warp, in every lane.
__device__ SumExp WarpMerge(const SumExp& x) {
  const float top = WarpMax(x.maximum);
  return {top, WarpSum(x.SumAt(top))};
}

// Vectors [begin, end) of a row belong to this CTA. The last of the row may reach past the vocabulary, where
// the row's stride covers it.
struct Slice {
  int64_t vocab, begin, end;
};

__device__ Slice SliceOf(int64_t vocab, int64_t vectors, int rank, int ranks) {
  const int64_t share = (vectors + ranks - 1) / ranks;
  const int64_t begin = min(rank * share, vectors);
  return {vocab, begin, min(begin + share, vectors)};
}

// Calls use(vector) for this thread's share.
template <typename Use>
__device__ void ForEachVector(int64_t begin, int64_t end, Use&& use) {
#pragma unroll 4
  for (int64_t vector = begin + threadIdx.x; vector < end; vector += kThreads) use(vector);
}

// Copies the slice to `kept` and sums it, the first half while the second is under way. A thread reads only
// what it copied, here and for the gradient.
__device__ SumExp LoadSlice(const float* row, const Slice& slice, Logits* kept) {
  const int64_t passes = (slice.end - slice.begin + kThreads - 1) / kThreads;
  const int64_t middle = min(slice.begin + passes / 2 * kThreads, slice.end);
  const auto copy = [&](int64_t vector) {
    CopyAsync16(SharedAddress(kept + (vector - slice.begin)), row + vector * N);
  };
  SumExp sum;
  const auto add = [&](int64_t vector) {
    Logits logits = kept[vector - slice.begin];
    const int64_t inside = slice.vocab - vector * N;
    if (inside < N) {
#pragma unroll
      for (int i = 0; i < N; ++i) logits.value[i] = i < inside ? logits.value[i] : -INFINITY;
    }
    sum.Add(logits);
  };
  ForEachVector(slice.begin, middle, copy);
  CopyAsyncCommit();
  ForEachVector(middle, slice.end, copy);
  CopyAsyncCommit();
  CopyAsyncWait<1>();
  ForEachVector(slice.begin, middle, add);
  CopyAsyncWait<0>();
  ForEachVector(middle, slice.end, add);
  return sum;
}

// The copy alone.
__device__ void CopySlice(const float* row, const Slice& slice, Logits* kept) {
  ForEachVector(slice.begin, slice.end, [&](int64_t vector) {
    CopyAsync16(SharedAddress(kept + (vector - slice.begin)), row + vector * N);
  });
  CopyAsyncCommit();
  CopyAsyncWait<0>();
}

// The total of the row from the sums of its warps, in every thread.
__device__ SumExp RowTotal(const SumExp (&sums)[kMaxCluster][kWarps], int ranks) {
  SumExp total;
  for (int i = threadIdx.x % 32; i < ranks * kWarps; i += 32) total.Merge(sums[i / kWarps][i % kWarps]);
  return WarpMerge(total);
}

template <typename Grad>
__device__ void ZeroSlice(const Slice& slice, Grad* gradient) {
  const float zero[N] = {};
  ForEachVector(slice.begin, slice.end,
                [&](int64_t vector) { StorePack<N>(PackOf<Grad>(zero), gradient + vector * N); });
}

// What the gradient of a row is made of.
struct RowGradient {
  float log2_maximum;  // of the logits, times log2(e)
  float factor;        // scale / sum
  int32_t target;
  float of_target;  // from the f32 probability, not from the rounded gradient
};

template <typename Grad>
__device__ void WriteSlice(const Logits* logits, const Slice& slice, const RowGradient& row, Grad* gradient) {
  ForEachVector(slice.begin, slice.end, [&](int64_t vector) {
    const Logits pack = logits[vector - slice.begin];
    const auto target = static_cast<int32_t>(row.target - vector * N);
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = row.factor * Exp2(fmaf(pack[i], kLog2E, -row.log2_maximum));
      if (i == target) value[i] = row.of_target;
    }
    StorePack<N>(PackOf<Grad>(value), gradient + vector * N);
  });
}

// Which logit of a row is its token's target; -1: in another part, or not counted.
__device__ int32_t TargetInRow(const CudaCrossEntropyArgs& args, int64_t t) {
  const int64_t target = args.targets[t] - args.begin;
  return target < args.vocab ? static_cast<int32_t>(max(target, int64_t{-1})) : -1;
}

enum class Result { kLoss, kLossAndGradient, kStats };

template <typename Grad, Result kResult>
__global__ void __launch_bounds__(kThreads, 3) RowKernel(const CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ SumExp sums[kMaxCluster][kWarps];  // of the whole row
  auto* kept = reinterpret_cast<Logits*>(memory);
  const cg::cluster_group cluster = cg::this_cluster();
  cg::cluster_group::arrival_token started = cluster.barrier_arrive();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t t = blockIdx.x / static_cast<uint32_t>(ranks);
  float* row = args.logits + t * args.stride;
  Grad* gradient = reinterpret_cast<Grad*>(row);
  const Slice slice = SliceOf(args.vocab, (args.vocab + N - 1) / N, rank, ranks);
  const int32_t target = TargetInRow(args, t);
  const SumExp sum = WarpMerge(LoadSlice(row, slice, kept));
  const float target_logit = row[max(target, 0)];  // before the barrier, so before any gradient
  const int lane = threadIdx.x % 32;
  cluster.barrier_wait(std::move(started));  // memory of others exists
  if (lane < ranks) *cluster.map_shared_rank(&sums[rank][threadIdx.x / 32], lane) = sum;
  cluster.sync();
  if (kResult != Result::kStats && target < 0) {
    if (kResult == Result::kLossAndGradient) ZeroSlice(slice, gradient);
    if (rank == 0 && threadIdx.x == 0) args.row_loss[t] = 0;
    return;
  }
  const SumExp total = RowTotal(sums, ranks);
  if constexpr (kResult == Result::kStats) {
    if (rank != 0 || threadIdx.x != 0) return;
    args.stats[2 * t] = (total.maximum + log2f(total.sum)) / kLog2E;
    args.stats[2 * t + 1] = target < 0 ? 0.0f : target_logit;
    return;
  }
  const float log2_gap = total.maximum + log2f(total.sum) - target_logit * kLog2E;
  if (rank == 0 && threadIdx.x == 0) args.row_loss[t] = log2_gap / kLog2E;
  if constexpr (kResult == Result::kLossAndGradient) {
    const auto scale = static_cast<float>(args.scale);
    WriteSlice(kept, slice,
               {.log2_maximum = total.maximum,
                .factor = scale / total.sum,
                .target = target,
                .of_target = scale * (Exp2(-log2_gap) - 1.0f)},
               gradient);
  }
}

// The gradient of a part's slice from the stats of the whole row.
template <typename Grad>
__global__ void __launch_bounds__(kThreads, 3) GradientKernel(const CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* kept = reinterpret_cast<Logits*>(memory);
  const cg::cluster_group cluster = cg::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t t = blockIdx.x / static_cast<uint32_t>(ranks);
  float* row = args.logits + t * args.stride;
  Grad* gradient = reinterpret_cast<Grad*>(row);
  const Slice slice = SliceOf(args.vocab, (args.vocab + N - 1) / N, rank, ranks);
  const int32_t target = TargetInRow(args, t);
  const float target_logit = row[max(target, 0)];
  CopySlice(row, slice, kept);
  cluster.sync();  // every logit of the row is on chip
  if (args.targets[t] < 0) return ZeroSlice(slice, gradient);
  const auto scale = static_cast<float>(args.scale);
  const float log2_sum = args.stats[2 * t] * kLog2E;
  WriteSlice(kept, slice,
             {.log2_maximum = log2_sum,
              .factor = scale,
              .target = target,
              .of_target = scale * (Exp2(fmaf(target_logit, kLog2E, -log2_sum)) - 1.0f)},
             gradient);
}

__global__ void __launch_bounds__(kThreads)
    MergeKernel(const float* parts, int64_t count, int64_t tokens, float* stats) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const auto part = [&](int64_t p) { return parts + 2 * (p * tokens + t); };
  SumExp total;
  float target = 0;
  for (int64_t p = 0; p < count; ++p) {
    total.Merge({part(p)[0] * kLog2E, 1});
    target += part(p)[1];
  }
  stats[2 * t] = (total.maximum + log2f(total.sum)) / kLog2E;
  stats[2 * t + 1] = target;
}

// *total += the sum of value(i) for i in [0, count).
template <typename Value>
__device__ void AddSum(int64_t count, const Value& value, double* total) {
  __shared__ double warp_sum[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += value(i);
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (const double part : warp_sum) sum += part;
  *total += sum;
}

__global__ void __launch_bounds__(kThreads) AddSumKernel(const float* x, int64_t count, double* total) {
  AddSum(count, [&](int64_t i) { return x[i]; }, total);
}

__global__ void __launch_bounds__(kThreads)
    AddLossOfStatsKernel(const float* stats, const int32_t* targets, int64_t count, double* total) {
  const auto loss = [&](int64_t t) {
    return targets[t] < 0 ? 0.0 : static_cast<double>(stats[2 * t]) - static_cast<double>(stats[2 * t + 1]);
  };
  AddSum(count, loss, total);
}

// CTAs of a row: a power of two.
int ClusterOf(int64_t row_bytes) {
  int ranks = 1;
  while (ranks < kMaxCluster && row_bytes > ranks * kSliceBytes) ranks *= 2;
  return ranks;
}

// One of the kernels of rows.
cudaError_t Launch(void (*kernel)(CudaCrossEntropyArgs), const CudaCrossEntropyArgs& args,
                   cudaStream_t stream) {
  const int64_t vectors = CeilDiv(args.vocab, N);
  const int ranks = ClusterOf(vectors * kVectorBytes);
  const int64_t slice_bytes = CeilDiv(vectors, ranks) * kVectorBytes;
  if (args.stride % 8 != 0 || !Aligned(args.logits) || args.tokens * ranks > INT32_MAX ||
      args.vocab > kCudaCrossEntropyMaxVocab) {
    return cudaErrorInvalidValue;
  }
  if (args.tokens == 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(slice_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {.x = static_cast<uint32_t>(ranks), .y = 1, .z = 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(args.tokens * ranks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(slice_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

template <typename Grad>
cudaError_t CudaCrossEntropy(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(RowKernel<Grad, Result::kLossAndGradient>, args, stream);
}
cudaError_t CudaCrossEntropyLoss(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(RowKernel<float, Result::kLoss>, args, stream);
}
cudaError_t CudaCrossEntropyStats(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(RowKernel<float, Result::kStats>, args, stream);
}
template <typename Grad>
cudaError_t CudaCrossEntropyGradient(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(GradientKernel<Grad>, args, stream);
}

cudaError_t CudaAddLossOfStats(const float* stats, const int32_t* targets, int64_t tokens, double* sum,
                               cudaStream_t stream) {
  AddLossOfStatsKernel<<<1, kThreads, 0, stream>>>(stats, targets, tokens, sum);
  return cudaGetLastError();
}

cudaError_t CudaMergeVocabularyStats(const float* parts, int64_t count, int64_t tokens, float* stats,
                                     cudaStream_t stream) {
  const int64_t blocks = CeilDiv(tokens, kThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  MergeKernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(parts, count, tokens, stats);
  return cudaGetLastError();
}

cudaError_t CudaAddSum(const float* x, int64_t count, double* sum, cudaStream_t stream) {
  AddSumKernel<<<1, kThreads, 0, stream>>>(x, count, sum);
  return cudaGetLastError();
}

template cudaError_t CudaCrossEntropy<float>(const CudaCrossEntropyArgs&, cudaStream_t);
template cudaError_t CudaCrossEntropy<__nv_bfloat16>(const CudaCrossEntropyArgs&, cudaStream_t);
template cudaError_t CudaCrossEntropyGradient<float>(const CudaCrossEntropyArgs&, cudaStream_t);
template cudaError_t CudaCrossEntropyGradient<__nv_bfloat16>(const CudaCrossEntropyArgs&, cudaStream_t);

}  // namespace annulus::kernels
