// A cluster of CTAs a row, each with its slice of the logits on chip, in shared memory and registers: a logit
// is read once and its gradient written once, 6 bytes from f32 to bf16, which is the floor. (From global
// memory a second pass would read again: at a vocabulary of 128K the rows in work do not fit in L2.) That is
// 1/12 of the time of the three products at d = 4096.
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
// many CTAs at once, and then for memory. What matters is how many rows are at work at a time, which is why
// registers hold a part of them: at a vocabulary of 256K 90% of copy speed on an H200, and 83% without them.
// From 32K to 256K it is 88-90%.
//
// So from sm_90. Code for GPUs before, which have no clusters, is row_logits.cuh's.

#include "kernels/common/exp2.cuh"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
#include "kernels/cross_entropy/row_logits.cuh"

namespace annulus::kernels {
namespace {

constexpr int kCtas = 2;  // of an SM: one loads, one stores
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCluster = 16;          // on devices of compute capability 9.0; 8 are portable
constexpr int kSharedBytes = 109 << 10;  // of a slice, but for what registers hold
constexpr int SliceBytes(int held) { return kSharedBytes + held * kThreads * kVectorBytes; }
static_assert(kCudaCrossEntropyMaxVocab * sizeof(float) <= kMaxCluster * (112 << 10), "what the header says");

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
    for (int i = 1; i < kWidth; ++i) top = fmaxf(top, logits[i]);
    top *= kLog2E;
    if (top > maximum) {
      sum *= Exp2(maximum - top);
      maximum = top;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += Exp2(fmaf(logits[i], kLog2E, -maximum));
  }
};

// The total over the warp, in every lane.
__device__ SumExp WarpMerge(const SumExp& x) {
  const float top = WarpMax(x.maximum);
  return {top, WarpSum(x.SumAt(top))};
}

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

// Over the row's logits; asks for the next row's on the way.
template <typename Grad, int kVectors>
__device__ void WriteGradient(Kept<kVectors>& kept, const RowGradient& of_row, float* row,
                              const float* next) {
  Grad* const gradient = reinterpret_cast<Grad*>(row);
  const int target_vector = of_row.target < 0 ? -1 : of_row.target / kWidth;
  const auto write = [&](int vector, const Logits& logits) {
    float value[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      value[i] = of_row.factor * Exp2(fmaf(logits[i], kLog2E, -of_row.log2_maximum));
      if (!of_row.counted) value[i] = 0;
    }
    if (vector == target_vector) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] = i == of_row.target % kWidth ? of_row.of_target : value[i];
    }
    StorePack<kWidth>(PackOf<Grad>(value), gradient + int64_t{vector} * kWidth);
  };
  kept.ForEach(write, next, [] {});
}

// Which logit of a row is its token's target; -1: in another part, or not counted.
__device__ int32_t TargetInRow(const CudaCrossEntropyArgs& args, int64_t t) {
  const int64_t target = args.targets[t] - args.begin;
  return target < args.vocab ? static_cast<int32_t>(max(target, int64_t{-1})) : -1;
}

enum class Result { kLoss, kLossAndGradient, kStats };

// A cluster takes every step-th row.
template <typename Grad, Result kResult>
__global__ void __launch_bounds__(kThreads, kCtas)
    RowKernel(const __grid_constant__ CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ SumExp sums[2][kMaxCluster][kWarps];  // of the row; the next row's come while these are read
  const auto cluster = ThisCluster();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t step = gridDim.x / static_cast<uint32_t>(ranks);
  const int lane = threadIdx.x % 32;
  Kept<kHeld> kept(memory, args.vocab, rank, ranks);
  int64_t t = blockIdx.x / static_cast<uint32_t>(ranks);
  kept.Ask(args.logits + t * args.stride);
  cluster.sync();  // memory of others exists
  int32_t target = TargetInRow(args, t);
  for (int turn = 0; t < args.tokens; t += step, turn ^= 1) {
    float* const row = args.logits + t * args.stride;
    const float* const next = t + step < args.tokens ? row + step * args.stride : nullptr;
    const int32_t next_target = next == nullptr ? -1 : TargetInRow(args, t + step);
    SumExp sum;
    float target_logit = 0;
    bool owner = rank == 0 && threadIdx.x == 0 && target < 0;  // of the row's result
    const int target_vector = target < 0 ? -1 : target / kWidth;
    const auto add = [&](int vector, const Logits& logits) {
      sum.Add(kept.Inside(vector, args.vocab, logits));
      if (vector == target_vector) {
        owner = true;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) target_logit = i == target % kWidth ? logits[i] : target_logit;
      }
    };
    // A group of no copies where the gradient is still to come.
    kept.ForEach(add, kResult == Result::kLossAndGradient ? nullptr : next, [] { CopyAsyncWait<1>(); });
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

// The gradient of a part's slice from the stats of the whole row. All of it goes through shared memory, whose
// copies can be waited for before the barrier.
template <typename Grad>
__global__ void __launch_bounds__(kThreads, kCtas)
    GradientKernel(const __grid_constant__ CudaCrossEntropyArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  const auto cluster = ThisCluster();
  const auto rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
  const int64_t step = gridDim.x / static_cast<uint32_t>(ranks);
  Kept<0> kept(memory, args.vocab, rank, ranks);
  const auto scale = static_cast<float>(args.scale);
  for (int64_t t = blockIdx.x / static_cast<uint32_t>(ranks); t < args.tokens; t += step) {
    float* const row = args.logits + t * args.stride;
    const int32_t target = TargetInRow(args, t);
    const float target_logit = row[max(target, 0)], log2_sum = args.stats[2 * t] * kLog2E;
    kept.Ask(row);
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

// One of the kernels of rows; held: vectors in its registers. A row takes as few CTAs as hold it, so that as
// many rows as possible are at work.
cudaError_t Launch(void (*kernel)(CudaCrossEntropyArgs), int held, const CudaCrossEntropyArgs& args,
                   cudaStream_t stream) {
  const int64_t row_bytes = CeilDiv(args.vocab, kWidth) * kVectorBytes;
  const auto ranks =
      static_cast<int>(std::clamp<int64_t>(CeilDiv(row_bytes, SliceBytes(held)), 1, kMaxCluster));
  const int shared_vectors = std::max(ShareOf(args.vocab, ranks) - held * kThreads, 0);
  const int slice_bytes = shared_vectors * kVectorBytes;
  if (args.stride % 8 != 0 || !Aligned(args.logits) || args.tokens * ranks > INT32_MAX ||
      args.vocab > kCudaCrossEntropyMaxVocab) {
    return cudaErrorInvalidValue;
  }
  if (args.tokens == 0) return cudaSuccess;
  cudaFuncAttributes compiled = {};
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess) return error;
  if (compiled.ptxVersion < 90) {  // by one CTA, out of global memory (row_logits.cuh)
    kernel<<<static_cast<uint32_t>(args.tokens), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, slice_bytes);
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
  return Launch(RowKernel<Grad, Result::kLossAndGradient>, kHeld, args, stream);
}
cudaError_t CudaCrossEntropyLoss(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(RowKernel<float, Result::kLoss>, kHeld, args, stream);
}
cudaError_t CudaCrossEntropyStats(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(RowKernel<float, Result::kStats>, kHeld, args, stream);
}
template <typename Grad>
cudaError_t CudaCrossEntropyGradient(const CudaCrossEntropyArgs& args, cudaStream_t stream) {
  return Launch(GradientKernel<Grad>, 0, args, stream);
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
