// A cluster of CTAs a row, each with its slice of the logits in shared memory: a logit is read once and its
// gradient written once, 6 bytes from f32 to bf16, which is the floor. (From global memory a second pass
// would read again: at a vocabulary of 128K the rows in work do not fit in L2.) That is 1/12 of the time of
// the three products at d = 4096.
//
//   row t:   (max, sum) of the slice by warps -> to every CTA of the row -> cluster barrier -> (max, sum) of
//            the row -> gradient of the slice
//   row t+1:                                        its slice is copied in behind the gradient of row t
//
// Of a part of the vocabulary the row's (max, sum) becomes its stats, and a second kernel copies the slice
// again for the gradient: 4 bytes more.
//
// After the barrier every logit of the row is on chip, so a narrower gradient may overwrite any of them. As
// many clusters run as the device holds and each takes many rows: a cluster that starts waits for room in as
// many CTAs at once, and then for memory. (With a cluster for every row, loss and gradient took 1-9% longer
// on an H200.) Of copy speed that is 86-91% at vocabularies of 32K and 50K, 82% at 128K and 75% at 256K,
// where only two dozen rows are at work at a time.

#include <cooperative_groups.h>

#include <bit>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/cross_entropy/cross_entropy_cuda.h"

namespace annulus::kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kPortableCluster = 8, kMaxCluster = 16;  // the latter on devices of compute capability 9.0
// Two CTAs of an SM, three where slices are short: some load while another stores. (With shorter slices in
// larger clusters rows wait for more of their CTAs: 72 KiB is 12-18% slower.)
constexpr int64_t kSliceBytes = 108 << 10;
constexpr int N = 4;  // logits of a vector
constexpr int64_t kVectorBytes = N * sizeof(float);
static_assert(kCudaCrossEntropyMaxVocab * sizeof(float) <= kMaxCluster * (112 << 10), "what the header says");

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

// The slice of a row in shared memory, of the next row where this one is done with. A thread reads only what
// it copied, so that it may ask for the next row's vector as soon as it has used this one's.
struct Kept {
  Logits* logits;
  Slice slice;

  __device__ const Logits& At(int64_t vector) const { return logits[vector - slice.begin]; }
  __device__ void Ask(int64_t vector, const float* row) const {
    CopyAsync16(SharedAddress(logits + (vector - slice.begin)), row + vector * N);
  }
  // -inf past the vocabulary.
  __device__ Logits Inside(int64_t vector) const {
    Logits pack = At(vector);
    const int64_t inside = slice.vocab - vector * N;
    if (inside < N) {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.value[i] = i < inside ? pack.value[i] : -INFINITY;
    }
    return pack;
  }
  // Calls use(vector) for this thread's share in two halves, each copied by a group of its own, the older one
  // first: one is under way while the other is worked on.
  template <typename Use>
  __device__ void ForEachHalf(Use&& use) const {
    const int64_t passes = (slice.end - slice.begin + kThreads - 1) / kThreads;
    const int64_t middle = min(slice.begin + passes / 2 * kThreads, slice.end);
    use(slice.begin, middle);
    use(middle, slice.end);
  }
};

// The total of the row from the sums of its warps, in every thread.
__device__ SumExp RowTotal(const SumExp (&sums)[kMaxCluster][kWarps], int ranks) {
  SumExp total;
  for (int i = threadIdx.x % 32; i < ranks * kWarps; i += 32) total.Merge(sums[i / kWarps][i % kWarps]);
  return WarpMerge(total);
}

// What the gradient of a row is made of.
struct RowGradient {
  float log2_maximum;  // of the logits, times log2(e)
  float factor;        // scale / sum
  int32_t target;      // -1: of another part
  float of_target;     // from the f32 probability, not from the rounded gradient
  bool counted;        // else zero
};

template <typename Grad>
__device__ void WriteVector(const Logits& logits, int64_t vector, const RowGradient& row, Grad* gradient) {
  const auto target = static_cast<int32_t>(row.target - vector * N);
  float value[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    value[i] = !row.counted ? 0.0f : row.factor * Exp2(fmaf(logits[i], kLog2E, -row.log2_maximum));
    if (i == target) value[i] = row.of_target;
  }
  StorePack<N>(PackOf<Grad>(value), gradient + vector * N);
}

// Over the row's logits; asks for the next row's on the way.
template <typename Grad>
__device__ void WriteGradient(const Kept& kept, const RowGradient& of_row, float* row, const float* next) {
  kept.ForEachHalf([&](int64_t begin, int64_t end) {
    ForEachVector(begin, end, [&](int64_t vector) {
      WriteVector(kept.At(vector), vector, of_row, reinterpret_cast<Grad*>(row));
      if (next != nullptr) kept.Ask(vector, next);
    });
    CopyAsyncCommit();
  });
}

// Which logit of a row is its token's target; -1: in another part, or not counted.
__device__ int32_t TargetInRow(const CudaCrossEntropyArgs& args, int64_t t) {
  const int64_t target = args.targets[t] - args.begin;
  return target < args.vocab ? static_cast<int32_t>(max(target, int64_t{-1})) : -1;
}

enum class Result { kLoss, kLossAndGradient, kStats };

// A cluster takes every step-th row.
template <typename Grad, Result kResult>
__global__ void __launch_bounds__(kThreads, 3) RowKernel(const __grid_constant__ CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ SumExp sums[2][kMaxCluster][kWarps];  // of the row; the next row's come while these are read
  const cg::cluster_group cluster = cg::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t step = gridDim.x / static_cast<uint32_t>(ranks);
  const int lane = threadIdx.x % 32;
  const Slice slice = SliceOf(args.vocab, (args.vocab + N - 1) / N, rank, ranks);
  const Kept kept{reinterpret_cast<Logits*>(memory), slice};
  int64_t t = blockIdx.x / static_cast<uint32_t>(ranks);
  kept.ForEachHalf([&](int64_t begin, int64_t end) {
    ForEachVector(begin, end, [&](int64_t vector) { kept.Ask(vector, args.logits + t * args.stride); });
    CopyAsyncCommit();
  });
  cluster.sync();  // memory of others exists
  int32_t target = TargetInRow(args, t);
  for (int turn = 0; t < args.tokens; t += step, turn ^= 1) {
    float* const row = args.logits + t * args.stride;
    const float* const next = t + step < args.tokens ? row + step * args.stride : nullptr;
    const int32_t next_target = next == nullptr ? -1 : TargetInRow(args, t + step);
    SumExp sum;
    float target_logit = 0;
    bool owner = rank == 0 && threadIdx.x == 0 && target < 0;  // of the row's result
    kept.ForEachHalf([&](int64_t begin, int64_t end) {
      CopyAsyncWait<1>();
      ForEachVector(begin, end, [&](int64_t vector) {
        const Logits logits = kept.Inside(vector);
        sum.Add(logits);
        if (target >= 0 && vector == target / N) {
          owner = true;
          target_logit = kept.At(vector).value[target % N];
        }
        if (kResult != Result::kLossAndGradient && next != nullptr) kept.Ask(vector, next);
      });
      CopyAsyncCommit();  // a group of no copies where the gradient is still to come
    });
    sum = WarpMerge(sum);
    if (lane < ranks) *cluster.map_shared_rank(&sums[turn][rank][threadIdx.x / 32], lane) = sum;
    cluster.sync();  // from here all logits of the row are on chip
    const SumExp total = RowTotal(sums[turn], ranks);
    const float log2_sum = total.maximum + log2f(total.sum), log2_gap = log2_sum - target_logit * kLog2E;
    if constexpr (kResult == Result::kStats) {
      if (owner) args.stats[2 * t] = log2_sum / kLog2E, args.stats[2 * t + 1] = target_logit;
    } else if (owner) {
      args.row_loss[t] = target < 0 ? 0 : log2_gap / kLog2E;
    }
    if constexpr (kResult == Result::kLossAndGradient) {
      const auto scale = static_cast<float>(args.scale);
      WriteGradient<Grad>(kept,
                          {.log2_maximum = total.maximum,
                           .factor = scale / total.sum,
                           .target = target,
                           .of_target = scale * (Exp2(-log2_gap) - 1.0f),
                           .counted = target >= 0},
                          row, next);
    }
    target = next_target;
  }
}

// The gradient of a part's slice from the stats of the whole row.
template <typename Grad>
__global__ void __launch_bounds__(kThreads, 3)
    GradientKernel(const __grid_constant__ CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  const cg::cluster_group cluster = cg::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t step = gridDim.x / static_cast<uint32_t>(ranks);
  const Slice slice = SliceOf(args.vocab, (args.vocab + N - 1) / N, rank, ranks);
  const Kept kept{reinterpret_cast<Logits*>(memory), slice};
  const auto scale = static_cast<float>(args.scale);
  for (int64_t t = blockIdx.x / static_cast<uint32_t>(ranks); t < args.tokens; t += step) {
    float* const row = args.logits + t * args.stride;
    const int32_t target = TargetInRow(args, t);
    const float target_logit = row[max(target, 0)], log2_sum = args.stats[2 * t] * kLog2E;
    ForEachVector(slice.begin, slice.end, [&](int64_t vector) { kept.Ask(vector, row); });
    CopyAsyncCommit();
    CopyAsyncWait<0>();
    cluster.sync();  // every logit of the row is on chip
    WriteGradient<Grad>(kept,
                        {.log2_maximum = log2_sum,
                         .factor = scale,
                         .target = target,
                         .of_target = scale * (Exp2(fmaf(target_logit, kLog2E, -log2_sum)) - 1.0f),
                         .counted = args.targets[t] >= 0},
                        row, nullptr);
  }
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

// CTAs of a row: a power of two while it is portable (at a vocabulary of 128K eight are 2% faster than five),
// then as few as hold it (at 256K ten, two an SM, are 10% faster than sixteen at the loss alone).
int ClusterOf(int64_t row_bytes) {
  const auto ranks = static_cast<uint64_t>(CeilDiv(row_bytes, kSliceBytes));
  if (ranks <= kPortableCluster) return static_cast<int>(std::bit_ceil(ranks));
  return static_cast<int>(std::min<uint64_t>(ranks, kMaxCluster));
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
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(slice_bytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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
  int clusters = 0;  // that the device has room for
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  config.gridDim.x = static_cast<uint32_t>(std::min<int64_t>(args.tokens, clusters) * ranks);
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
