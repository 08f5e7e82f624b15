#pragma once

// CTAs that stay and walk along rows of which each is reduced: the threads that share a row hold its columns.
// A row's reads begin while those before it are worked on, and arrive through shared memory, of which each
// thread has a ring of its own: registers would not hold enough of them.

#include "kernels/common/async_copy.cuh"
#include "kernels/common/parts.cuh"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {

inline constexpr int kBlockThreads = 128;   // several short rows to a CTA
inline constexpr int kPairThreads = 320;    // of one row, two such CTAs or more to an SM
inline constexpr int kMaxRowThreads = 512;  // of one row

// How a row's vectors lie in threads: N elements each, V to a thread; kThreads: of a CTA at most. A warp
// takes a row where it can, and then several warps make a CTA.
template <int kElements, int kVectors, int kMostThreads>
struct RowShape {
  static constexpr int N = kElements, V = kVectors, kThreads = kMostThreads;
  // Of one row: blockDim.x, which is known where a warp takes it.
  static __device__ int RowThreads() { return kThreads == kBlockThreads ? 32 : static_cast<int>(blockDim.x); }
  static __device__ int64_t Column(int v) {
    return int64_t{v * RowThreads() + static_cast<int>(threadIdx.x)} * N;
  }
  // Whether the row has this thread's vector v: all but the last are whole wherever elements come in vectors.
  static __device__ bool Has(int v, int64_t columns) { return (N > 1 && v < V - 1) || Column(v) < columns; }
};

__device__ inline float Plus(float a, float b) { return a + b; }
__device__ inline float2 Plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 WarpSum(float2 x) { return {WarpSum(x.x), WarpSum(x.y)}; }

// The sum, or two, over the threads of a row, the same bits in all of them.
//   part: [blockDim.y, blockDim.x / 32]; its next use is two calls later
template <typename S, typename Value>
__device__ Value RowSum(Value x, Value* part) {
  x = WarpSum(x);
  const int warps = S::RowThreads() / 32;
  if (warps == 1) return x;
  part += threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  Value sum = part[0];
  for (int w = 1; w < warps; ++w) sum = Plus(sum, part[w]);
  return sum;
}

// What a thread holds of a row: V vectors, zeros where the row has none.
template <typename T, typename S>
struct RowPart {
  Pack<T, S::N> pack[S::V] = {};
  __device__ RowPart(const T* row, int64_t columns) {
#pragma unroll
    for (int v = 0; v < S::V; ++v) {
      if (S::Has(v, columns)) pack[v] = LoadPack<S::N>(row + S::Column(v));
    }
  }
};

// What one thread reads of the rows of some operands, kStages - 1 rows ahead; where elements go one by one,
// or a ring would take too much memory, when they are taken. A thread reads only what it has copied itself.
template <typename T, typename S, int kOperands>
class RowRing {
 public:
  static constexpr int N = S::N, V = S::V;
  static constexpr bool kCopies = N > 1 && V <= 4;
  static constexpr int kStages = V <= 3 ? 3 : 2;
  static constexpr int kThreadBytes = kCopies ? kStages * kOperands * V * 16 : 0;
  struct Operand {
    const T* first;  // of this thread's group in the first row
    int64_t stride;
  };

  __device__ RowRing(void* shared, int64_t tokens, int64_t columns, const Operand (&operands)[kOperands])
      : slots_(static_cast<char*>(shared) + (threadIdx.y * S::RowThreads() + threadIdx.x) * 16),
        tokens_(tokens),
        columns_(columns) {
#pragma unroll
    for (int i = 0; i < kOperands; ++i) operands_[i] = operands[i];
  }

  // Into a stage, which takes the place of what is there.
  __device__ void Start(int stage, int64_t token) const {
    if constexpr (kCopies) {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          CopyAsync16(SharedAddress(Slot(stage, operand, v)), At(operand, token) + S::Column(v),
                      token < tokens_ && S::Has(v, columns_));
        }
      }
      CopyAsyncCommit();
    }
  }
  // For the oldest row that was started and not waited for.
  __device__ void Wait() const {
    if constexpr (kCopies) CopyAsyncWait<kStages - 2>();
  }
  // Zeros past the last token and column.
  __device__ Pack<T, N> Load(int stage, int64_t token, int operand, int v) const {
    if constexpr (kCopies) return LoadPack<N>(reinterpret_cast<const T*>(Slot(stage, operand, v)));
    if (token >= tokens_ || !S::Has(v, columns_)) return {};
    return LoadPack<N>(At(operand, token) + S::Column(v));
  }

 private:
  __device__ const T* At(int operand, int64_t token) const {
    return operands_[operand].first + token * operands_[operand].stride;
  }
  __device__ char* Slot(int stage, int operand, int v) const {
    const int rows = S::kThreads == kBlockThreads ? kBlockThreads / 32 : static_cast<int>(blockDim.y);
    return slots_ + ((stage * kOperands + operand) * V + v) * S::RowThreads() * rows * 16;
  }

  char* const slots_;
  const int64_t tokens_, columns_;
  Operand operands_[kOperands];
};

// Calls fn(token, load) for every gridDim.x-th blockDim.y tokens, the same number of times in all threads of
// the CTA; load(operand, v): this thread's vector of it, zeros past the last token.
template <typename Ring, typename Fn>
__device__ void WalkRows(const Ring& ring, int64_t tokens, const Fn& fn) {
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
#pragma unroll
  for (int stage = 0; stage < Ring::kStages - 1; ++stage) ring.Start(stage, token + stage * step);
  int stage = 0, last = Ring::kStages - 1;
  for (int64_t begin = int64_t{blockIdx.x} * blockDim.y; begin < tokens; begin += step, token += step) {
    ring.Wait();
    ring.Start(last, token + (Ring::kStages - 1) * step);
    fn(token, [&](int operand, int v) { return ring.Load(stage, token, operand, v); });
    last = stage;
    stage = stage + 1 < Ring::kStages ? stage + 1 : 0;
  }
}

// Threads of a CTA whose rows have so many columns: of a row, and rows. None where that are too many.
template <typename S>
dim3 RowThreadsOf(int64_t columns) {
  const int64_t threads = 32 * CeilDiv(CeilDiv(columns, S::N), 32 * S::V);
  if (threads > S::kThreads) return dim3(0);
  return dim3(static_cast<uint32_t>(threads),
              static_cast<uint32_t>(std::max<int64_t>(1, kBlockThreads / threads)));
}

// The same of CTAs with rings, their memory, and how many of them an SM takes.
struct RingCtas {
  dim3 threads;
  size_t shared_bytes = 0;
  int resident = 0;
};
template <typename S, typename Ring, typename Kernel>
cudaError_t PlanRingCtas(Kernel* kernel, int64_t columns, RingCtas* ctas) {
  ctas->threads = RowThreadsOf<S>(columns);
  const int threads = static_cast<int>(ctas->threads.x * ctas->threads.y);
  if (threads == 0) return cudaErrorInvalidValue;
  ctas->shared_bytes = static_cast<size_t>(threads) * Ring::kThreadBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(ctas->shared_bytes));
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas->resident, kernel, threads, ctas->shared_bytes);
}

}  // namespace annulus::kernels
