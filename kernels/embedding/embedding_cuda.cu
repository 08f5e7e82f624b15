// Gather, and a scatter-add whose order of additions is fixed.
//
//   tokens, grouped:   c c a a a | d d d d d d | d d d b a' ...    equal tokens side by side, in order of t
//   pieces:            [   0     ] [    1      ] [    2   ...       kPieceTokens occurrences each
//
// The order of the groups does not matter: CTA b of the first kernel counts and places the tokens that are b
// modulo the number of CTAs, all in one pass over the tokens, so no sort is needed. In the second a CTA takes
// a slab of columns of a piece. A run (the occurrences of one token) of at most kWholeRun is added to its row
// of dtable by the piece where it begins. A longer one (d) leaves a partial row for each of its pieces, and
// whichever of them comes last adds those rows, in order.
//
// Floors: gather 2 elements moved per element of y, but rows read once while L2 holds them; scatter-add one
// read of dy and one update of each touched row.

#include <cub/block/block_scan.cuh>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/embedding/embedding_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kGatherThreads = 64;
constexpr int kGatherUnroll = 2;  // vectors in flight per thread

// Column blocks are the slow part of the grid, so that the rows' parts at work fit in L2: 24 MB for 12K
// distinct tokens. (Whole rows at a time: 6% slower.) y is evicted first, so that they stay there.
template <typename T, int N>
__global__ void __launch_bounds__(kGatherThreads)
    GatherKernel(int64_t row_vectors, const int32_t* __restrict__ tokens, const T* __restrict__ table,
                 T* __restrict__ y) {
  const int64_t first = int64_t{blockIdx.y} * (kGatherThreads * kGatherUnroll) + threadIdx.x;
  const int32_t token = tokens[blockIdx.x];
  const T* from = table + token * row_vectors * N;
  T* to = y + blockIdx.x * row_vectors * N;
  constexpr float kZeros[N] = {};
  Pack<T, N> pack[kGatherUnroll];
#pragma unroll
  for (int u = 0; u < kGatherUnroll; ++u) {
    const int64_t vector = first + u * kGatherThreads;
    pack[u] = PackOf<T>(kZeros);
    if (token >= 0 && vector < row_vectors) pack[u] = LoadPack<N>(from + vector * N);
  }
#pragma unroll
  for (int u = 0; u < kGatherUnroll; ++u) {
    const int64_t vector = first + u * kGatherThreads;
    if (vector < row_vectors) StorePackStreaming<N>(pack[u], to + vector * N);
  }
}

template <typename T, int N>
cudaError_t LaunchGather(int64_t token_count, int64_t d, const int32_t* tokens, const T* table, T* y,
                         cudaStream_t stream) {
  const int64_t parts = CeilDiv(d / N, kGatherThreads * kGatherUnroll);
  if (token_count > INT32_MAX || parts > UINT16_MAX) return cudaErrorInvalidValue;
  if (token_count * d == 0) return cudaSuccess;
  const dim3 grid(static_cast<uint32_t>(token_count), static_cast<uint32_t>(parts));
  GatherKernel<T, N><<<grid, kGatherThreads, 0, stream>>>(d / N, tokens, table, y);
  return cudaGetLastError();
}

// Where a token stands in the input, and its run among the grouped tokens: [begin, end).
struct alignas(16) Occurrence {
  int32_t token, place, begin, end;
};

constexpr int kGroupThreads = 1024, kGroupWarps = kGroupThreads / 32;
constexpr int kGroupAhead = 8;  // tokens in flight per thread

// Calls use(t, token) for [begin, end) in order, 32 at a time; token is negative past the end.
template <typename Use>
__device__ void ForEachToken(const int32_t* __restrict__ tokens, int begin, int end, Use&& use) {
  const int lane = threadIdx.x % 32;
  for (int first = begin; first < end; first += 32 * kGroupAhead) {
    int32_t token[kGroupAhead];
#pragma unroll
    for (int u = 0; u < kGroupAhead; ++u) {
      const int t = first + u * 32 + lane;
      token[u] = t < end ? tokens[t] : -1;
    }
#pragma unroll
    for (int u = 0; u < kGroupAhead; ++u) use(first + u * 32 + lane, token[u]);
  }
}

// How tokens are shared out over CTAs: token t is number t >> bits of CTA t mod 2^bits.
struct Buckets {
  int bits, tokens;  // tokens of a CTA
};
Buckets BucketsOf(int64_t vocab) {
  int bits = 7;  // 128 CTAs
  while (CeilDiv(vocab, int64_t{1} << bits) > kGroupThreads) ++bits;
  return {bits, static_cast<int>(CeilDiv(vocab, int64_t{1} << bits))};
}

// A warp takes a share of the tokens and counts for itself, so that warps in order are tokens in order. *held
// is how many tokens are not negative. Also clears `arrivals`.
__global__ void __launch_bounds__(kGroupThreads)
    GroupKernel(int count, const int32_t* __restrict__ tokens, Buckets buckets,
                Occurrence* __restrict__ grouped, int32_t* __restrict__ held, int32_t* __restrict__ arrivals,
                int arrival_count) {
  extern __shared__ int32_t counts[];  // [warps, tokens of the CTA], then run[tokens + 1]
  __shared__ int32_t before;           // occurrences of tokens of the CTAs before
  using Scan = cub::BlockScan<int32_t, kGroupThreads>;
  __shared__ typename Scan::TempStorage scan;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t bucket = blockIdx.x, mask = gridDim.x - 1;
  int32_t* const own = counts + warp * buckets.tokens;
  int32_t* const run = counts + kGroupWarps * buckets.tokens;
  for (int i = thread; i < kGroupWarps * buckets.tokens; i += kGroupThreads) counts[i] = 0;
  for (int i = blockIdx.x * kGroupThreads + thread; i < arrival_count; i += gridDim.x * kGroupThreads) {
    arrivals[i] = 0;
  }
  if (thread == 0) before = 0;
  __syncthreads();

  const int share = (count + kGroupThreads - 1) / kGroupThreads * 32;
  const int begin = min(warp * share, count), end = min(begin + share, count);
  int lower = 0;
  ForEachToken(tokens, begin, end, [&](int, int32_t token) {
    if (token < 0) return;
    const uint32_t of = static_cast<uint32_t>(token) & mask;
    lower += of < bucket;
    if (of == bucket) atomicAdd(own + (token >> buckets.bits), 1);
  });
  lower = __reduce_add_sync(0xffffffffu, lower);
  if (lane == 0) atomicAdd(&before, lower);
  __syncthreads();

  // Counts become places within the run; runs follow each other.
  int32_t total = 0, first = 0;
  if (thread < buckets.tokens) {
    for (int w = 0; w < kGroupWarps; ++w) {
      int32_t& of_warp = counts[w * buckets.tokens + thread];
      const int32_t n = of_warp;
      of_warp = total;
      total += n;
    }
  }
  Scan(scan).ExclusiveSum(total, first);
  if (thread < buckets.tokens) run[thread] = before + first;
  if (thread == kGroupThreads - 1) {
    run[buckets.tokens] = before + first + total;
    if (bucket == mask) *held = before + first + total;
  }
  __syncthreads();

  ForEachToken(tokens, begin, end, [&](int t, int32_t token) {
    const bool ours = token >= 0 && (static_cast<uint32_t>(token) & mask) == bucket;
    const uint32_t lanes = __ballot_sync(0xffffffffu, ours);
    if (lanes == 0) return;
    if (ours) {
      const int number = token >> buckets.bits;
      const uint32_t same = __match_any_sync(lanes, number);
      const int earlier = __popc(same & ((1u << lane) - 1));
      const int at = run[number] + own[number] + earlier;
      __syncwarp(lanes);
      if (earlier == 0) own[number] += __popc(same);
      grouped[at] = {token, t, run[number], run[number + 1]};
    }
    __syncwarp();
  });
}

template <int N>
struct Sum {
  float value[N] = {};
  template <typename T>
  __device__ void Add(const Pack<T, N>& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += x[i];
  }
  __device__ void Store(float* p) const { StorePack<N>(PackOf<float>(value), p); }
  // An element of dtable has one writer, so the order of additions is fixed. (With vectors of atomics,
  // for which nobody waits, all took a quarter longer.)
  __device__ void AddTo(float* p) {
    Add(LoadPack<N>(static_cast<const float*>(p)));
    Store(p);
  }
};

constexpr int kPieceTokens = 32;
constexpr int kWholeRun = 128;    // longer runs are cut: of Zipf's tokens few are, so partial rows are few
constexpr int kSlabThreads = 64;  // columns of one CTA, in vectors
constexpr int kAhead = 8;         // rows in flight

struct Grouped {
  int slabs;
  const int32_t* held;  // how many
  const Occurrence* at;
  // [pieces, 2, d]: 0 of the cut run that came in from the piece before, 1 of the one that begins here
  float* partial;
  int32_t* arrivals;  // [pieces, slabs]: pieces done of the cut run that begins in a piece
};

__device__ bool IsCut(const Occurrence& run) { return run.end - run.begin > kWholeRun; }

// A piece in shared memory: its own tokens [begin, end) of the grouped ones.
struct Piece {
  static constexpr int kMaxTokens = kPieceTokens + kWholeRun;
  int number, begin, end;
  Occurrence of[kMaxTokens];

  // Whole runs belong to the piece where they begin. All threads call it; it ends with a barrier.
  __device__ void Load(const Grouped& grouped, int piece) {
    const int held = *grouped.held, first = piece * kPieceTokens, last = min(first + kPieceTokens, held);
    if (first >= held) {  // all of its tokens are negative
      if (threadIdx.x == 0) begin = end = first;
      __syncthreads();
      return;
    }
    const Occurrence front = grouped.at[first], back = grouped.at[last - 1];
    const int from = front.begin < first && !IsCut(front) ? front.end : first;
    const int to = IsCut(back) ? last : back.end;
    for (int i = from + static_cast<int>(threadIdx.x); i < to; i += kSlabThreads) {
      of[i - from] = grouped.at[i];
    }
    if (threadIdx.x == 0) number = piece, begin = from, end = to;
    __syncthreads();
  }
};

// Rows of dy, copied to shared memory some rows ahead of their use. A thread reads what it copied itself, so
// no barrier is needed. Where vectors are not of 16 bytes rows are read when they are used.
template <typename T, int N>
struct RowsAhead {
  static constexpr bool kAsync = N * sizeof(T) == 16;
  Pack<T, N> rows[kAhead][kSlabThreads];

  __device__ void Fetch(int i, const T* row) {
    if constexpr (kAsync) CopyAsync16(SharedAddress(&rows[i % kAhead][threadIdx.x]), row);
  }
  __device__ Pack<T, N> Get(int i, const T* row) {
    if constexpr (!kAsync) return LoadPack<N>(row);
    CopyAsyncWait<kAhead - 1>();
    return rows[i % kAhead][threadIdx.x];
  }
};

// Sums the runs of a piece: whole ones into dtable, parts of cut ones into partial rows.
template <typename T, int N>
__device__ void AddRuns(const Piece& piece, const Grouped& grouped, int64_t d, int64_t column, const T* dy,
                        float* dtable, RowsAhead<T, N>& ahead) {
  const int count = piece.end - piece.begin;
  const auto row = [&](int i) { return dy + piece.of[i].place * d + column; };
  const auto fetch = [&](int i) {
    if (i < count) ahead.Fetch(i, row(i));
    CopyAsyncCommit();
  };
  for (int i = 0; i < kAhead; ++i) fetch(i);
  Sum<N> sum;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    sum.Add(ahead.Get(i, row(i)));
    fetch(i + kAhead);
    const Occurrence& run = piece.of[i];
    if (i + 1 != count && piece.begin + i + 1 != run.end) continue;
    if (IsCut(run)) {
      const int slot = run.begin < piece.begin ? 0 : 1;
      sum.Store(grouped.partial + (2 * int64_t{piece.number} + slot) * d + column);
    } else {
      sum.AddTo(dtable + run.token * d + column);
    }
    sum = Sum<N>();
  }
}

// Of the pieces of a cut run the last one to come here adds all partial rows, in order. All threads call it.
template <int N>
__device__ void AddCutRun(const Occurrence& run, const Grouped& grouped, int64_t d, int64_t column,
                          float* dtable) {
  __shared__ bool all;
  const int from = run.begin / kPieceTokens, to = (run.end - 1) / kPieceTokens;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* arrivals = grouped.arrivals + int64_t{from} * grouped.slabs + blockIdx.x % grouped.slabs;
    all = atomicAdd(arrivals, 1) == to - from;
  }
  __syncthreads();
  if (!all || column >= d) return;
  __threadfence();
  const float* partial = grouped.partial + column;
  Sum<N> sum;
  sum.Add(LoadPack<N>(partial + (2 * int64_t{from} + 1) * d));
#pragma unroll 4  // rows in flight
  for (int64_t piece = from + 1; piece <= to; ++piece) sum.Add(LoadPack<N>(partial + 2 * piece * d));
  sum.AddTo(dtable + run.token * d + column);
}

// The slabs of a piece follow each other, so that CTAs at work together read and update whole rows.
template <typename T, int N>
__global__ void __launch_bounds__(kSlabThreads, 16)
    PieceKernel(Grouped grouped, int64_t d, const T* __restrict__ dy, float* dtable) {
  __shared__ Piece piece;
  __shared__ RowsAhead<T, N> ahead;
  piece.Load(grouped, static_cast<int>(blockIdx.x) / grouped.slabs);
  if (piece.begin >= piece.end) return;  // in the middle of a whole run, or behind all
  const int64_t column = (int64_t{blockIdx.x} % grouped.slabs * kSlabThreads + threadIdx.x) * N;
  if (column < d) AddRuns<T, N>(piece, grouped, d, column, dy, dtable, ahead);
  const Occurrence& front = piece.of[0];
  const Occurrence& back = piece.of[piece.end - piece.begin - 1];
  if (IsCut(front) && front.begin < piece.begin) AddCutRun<N>(front, grouped, d, column, dtable);
  if (IsCut(back) && back.begin >= piece.begin) AddCutRun<N>(back, grouped, d, column, dtable);
}

// Offsets of the parts of the scratch.
struct Scratch {
  int64_t grouped, partial, held, arrivals, bytes, arrival_count;
};
Scratch LayOut(int64_t count, int64_t d) {
  constexpr int64_t kAlignment = 256;
  const auto round_up = [](int64_t bytes) { return CeilDiv(bytes, kAlignment) * kAlignment; };
  const int64_t pieces = CeilDiv(count, kPieceTokens);
  Scratch s{};
  s.partial = round_up(count * static_cast<int64_t>(sizeof(Occurrence)));
  s.held = s.partial + round_up(2 * pieces * d * static_cast<int64_t>(sizeof(float)));
  s.arrivals = s.held + kAlignment;
  s.arrival_count = pieces * CeilDiv(d, kSlabThreads);  // slabs of the narrowest vectors
  s.bytes = s.arrivals + round_up(s.arrival_count * static_cast<int64_t>(sizeof(int32_t)));
  return s;
}

struct GroupResults {
  Occurrence* grouped;
  int32_t *held, *arrivals;
  int64_t arrival_count;
};
cudaError_t Group(int64_t count, int64_t vocab, const int32_t* tokens, const GroupResults& to,
                  cudaStream_t stream) {
  const Buckets buckets = BucketsOf(vocab);
  const int bytes = ((kGroupWarps + 1) * buckets.tokens + 1) * static_cast<int>(sizeof(int32_t));
  const cudaError_t error =
      cudaFuncSetAttribute(GroupKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  GroupKernel<<<1u << buckets.bits, kGroupThreads, bytes, stream>>>(static_cast<int>(count), tokens, buckets,
                                                                    to.grouped, to.held, to.arrivals,
                                                                    static_cast<int>(to.arrival_count));
  return cudaGetLastError();
}

template <typename T, int N>
cudaError_t AddPieces(const CudaEmbeddingBackwardArgs<T>& args, Grouped grouped, cudaStream_t stream) {
  grouped.slabs = static_cast<int>(CeilDiv(args.d, int64_t{kSlabThreads} * N));
  const int64_t blocks = CeilDiv(args.token_count, kPieceTokens) * grouped.slabs;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  PieceKernel<T, N>
      <<<static_cast<uint32_t>(blocks), kSlabThreads, 0, stream>>>(grouped, args.d, args.dy, args.dtable);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t CudaEmbeddingForward(int64_t token_count, int64_t d, const int32_t* tokens, const T* table, T* y,
                                 cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = d % kN == 0 && Aligned(table) && Aligned(y);
  return fit ? LaunchGather<T, kN>(token_count, d, tokens, table, y, stream)
             : LaunchGather<T, 1>(token_count, d, tokens, table, y, stream);
}

int64_t CudaEmbeddingBackwardScratchBytes(int64_t token_count, int64_t d) {
  return LayOut(token_count, d).bytes;
}

template <typename T>
cudaError_t CudaEmbeddingBackward(const CudaEmbeddingBackwardArgs<T>& args, cudaStream_t stream) {
  if (args.token_count * args.d == 0) return cudaSuccess;
  const Scratch layout = LayOut(args.token_count, args.d);
  if (args.token_count > INT32_MAX / 2 || layout.arrival_count > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  char* base = static_cast<char*>(args.scratch);
  auto* at = reinterpret_cast<Occurrence*>(base + layout.grouped);
  auto* partial = reinterpret_cast<float*>(base + layout.partial);
  auto* held = reinterpret_cast<int32_t*>(base + layout.held);
  auto* arrivals = reinterpret_cast<int32_t*>(base + layout.arrivals);
  const cudaError_t error =
      Group(args.token_count, args.vocab, args.tokens, {at, held, arrivals, layout.arrival_count}, stream);
  if (error != cudaSuccess) return error;
  const Grouped grouped{0, held, at, partial, arrivals};
  constexpr int kN = kVectorElements<T>;
  const bool fit = args.d % kN == 0 && Aligned(args.dy) && Aligned(args.dtable);
  return fit ? AddPieces<T, kN>(args, grouped, stream) : AddPieces<T, 1>(args, grouped, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                 \
  template cudaError_t CudaEmbeddingForward<T>(int64_t, int64_t, const int32_t*, const T*, T*, \
                                               cudaStream_t);                                  \
  template cudaError_t CudaEmbeddingBackward<T>(const CudaEmbeddingBackwardArgs<T>&, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
