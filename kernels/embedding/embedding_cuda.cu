// Gather, and a scatter-add whose order of additions is fixed:
//
//   sorted:   a a a b b | b b b b b | b c c d d      stable sort: equal tokens stay in order of t
//   pieces:   [   0    ] [   1     ] [   2    ]      kPieceTokens occurrences each; a CTA takes a slab of
//                                                    columns of one
//
// A run that lies inside one piece is added to its row of dtable there and then. A run cut by a boundary (b)
// leaves one partial row per piece, `open` where it starts or passes, `close` where it ends; the second
// kernel adds the partial rows of such a run to dtable, in order, from the piece where it starts.
//
// Floors: gather 2 elements moved per element of y; scatter-add one read of dy and one update of each touched
// row. The sort comes beside that: 53 us for 32K tokens on H100, mostly latency.

#include <cub/device/device_radix_sort.cuh>

#include "kernels/common/vector.cuh"
#include "kernels/embedding/embedding_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kPieceTokens = 64;  // partial rows are then at most 1/32 of dy's rows
constexpr int kSlabThreads = 64;      // columns of one CTA, in vectors
constexpr int kGatherThreads = 128;
constexpr int kGatherUnroll = 4;  // vectors in flight per thread
constexpr int64_t kAlignment = 256;

// Vector v of y is vector v % row_vectors of a row of the table: all threads have kGatherUnroll loads in
// flight, however short a row is. y is evicted first, so that rows of frequent tokens stay in L2.
template <typename T, int N>
__global__ void __launch_bounds__(kGatherThreads)
    GatherKernel(uint32_t vectors, uint32_t row_vectors, const int32_t* __restrict__ tokens,
                 const T* __restrict__ table, T* __restrict__ y) {
  const int64_t first = int64_t{blockIdx.x} * (kGatherThreads * kGatherUnroll) + threadIdx.x;
  Pack<T, N> pack[kGatherUnroll];
#pragma unroll
  for (int u = 0; u < kGatherUnroll; ++u) {
    const int64_t vector = first + u * kGatherThreads;
    if (vector >= vectors) continue;
    const uint32_t row = static_cast<uint32_t>(vector) / row_vectors;
    const uint32_t column = static_cast<uint32_t>(vector) - row * row_vectors;
    pack[u] = LoadPack<N>(table + (int64_t{tokens[row]} * row_vectors + column) * N);
  }
#pragma unroll
  for (int u = 0; u < kGatherUnroll; ++u) {
    const int64_t vector = first + u * kGatherThreads;
    if (vector < vectors) StorePackStreaming<N>(pack[u], y + vector * N);
  }
}

template <typename T, int N>
cudaError_t LaunchGather(int64_t token_count, int64_t d, const int32_t* tokens, const T* table, T* y,
                         cudaStream_t stream) {
  const int64_t vectors = token_count * d / N;
  if (vectors > UINT32_MAX) return cudaErrorInvalidValue;
  if (vectors == 0) return cudaSuccess;
  const auto blocks = static_cast<uint32_t>(CeilDiv(vectors, kGatherThreads * kGatherUnroll));
  GatherKernel<T, N><<<blocks, kGatherThreads, 0, stream>>>(static_cast<uint32_t>(vectors),
                                                            static_cast<uint32_t>(d / N), tokens, table, y);
  return cudaGetLastError();
}

__global__ void IotaKernel(int count, int32_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = i;
}

struct Sorted {
  int count;
  const int32_t* token;  // ascending
  const int32_t* place;  // t of each
};

template <int N>
struct Sum {
  float value[N] = {};
  template <typename T>
  __device__ void Add(const Pack<T, N>& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += x[i];
  }
  // An element of dtable has one writer, so the order of additions is fixed.
  __device__ void AddTo(float* p) const {
    const Pack<float, N> before = LoadPack<N>(static_cast<const float*>(p));
    float after[N];
#pragma unroll
    for (int i = 0; i < N; ++i) after[i] = before[i] + value[i];
    StorePack<N>(PackOf<float>(after), p);
  }
};

// The slabs of a piece follow each other, so that CTAs at work together read and update whole rows.
struct PiecePlace {
  int64_t piece, column;
};
template <int N>
__device__ PiecePlace PlaceOf(uint32_t slabs) {
  return {blockIdx.x / slabs, (int64_t{blockIdx.x % slabs} * kSlabThreads + threadIdx.x) * N};
}

// partial: [pieces, 2, d]: 0 the run that came in from the piece before, 1 the run that goes on and started
// here.
template <typename T, int N>
__global__ void __launch_bounds__(kSlabThreads)
    PieceKernel(Sorted sorted, int64_t d, uint32_t slabs, const T* __restrict__ dy,
                float* __restrict__ partial, float* __restrict__ dtable) {
  const auto [piece, column] = PlaceOf<N>(slabs);
  if (column >= d) return;
  const int begin = static_cast<int>(piece * kPieceTokens);
  const int end = min(sorted.count, begin + static_cast<int>(kPieceTokens));
  const bool comes_in = begin > 0 && sorted.token[begin - 1] == sorted.token[begin];
  const bool goes_on = end < sorted.count && sorted.token[end - 1] == sorted.token[end];
  constexpr int kAhead = 8;  // rows in flight
  Sum<N> sum;
  int run_begin = begin;
  for (int first = begin; first < end; first += kAhead) {
    Pack<T, N> row[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u < end) row[u] = LoadPack<N>(dy + int64_t{sorted.place[first + u]} * d + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u;
      if (i >= end) break;
      sum.Add(row[u]);
      const bool last = i + 1 == end;
      if (!last && sorted.token[i + 1] == sorted.token[i]) continue;
      if (run_begin == begin && comes_in) {
        StorePack<N>(PackOf<float>(sum.value), partial + (2 * piece) * d + column);
      } else if (last && goes_on) {
        StorePack<N>(PackOf<float>(sum.value), partial + (2 * piece + 1) * d + column);
      } else {
        sum.AddTo(dtable + sorted.token[i] * d + column);
      }
      sum = Sum<N>();
      run_begin = i + 1;
    }
  }
}

// End of the run that position `from` is in.
__device__ int RunEnd(const Sorted& sorted, int from) {
  int inside = from, outside = sorted.count;
  while (outside - inside > 1) {
    const int middle = inside + (outside - inside) / 2;
    (sorted.token[middle] == sorted.token[from] ? inside : outside) = middle;
  }
  return outside;
}

// Adds the run that starts in this piece and goes on.
template <int N>
__global__ void __launch_bounds__(kSlabThreads)
    CutRunKernel(Sorted sorted, int64_t d, uint32_t slabs, const float* __restrict__ partial,
                 float* __restrict__ dtable) {
  const auto [piece, column] = PlaceOf<N>(slabs);
  const int64_t begin = piece * kPieceTokens, end = begin + kPieceTokens;
  if (column >= d || end >= sorted.count) return;
  const int32_t token = sorted.token[end - 1];
  if (sorted.token[end] != token) return;  // no run goes on
  if (begin > 0 && sorted.token[begin] == token && sorted.token[begin - 1] == token)
    return;  // started before
  Sum<N> sum;
  sum.Add(LoadPack<N>(partial + (2 * piece + 1) * d + column));
  const int64_t last = (RunEnd(sorted, static_cast<int>(end)) - 1) / kPieceTokens;
#pragma unroll 8  // rows in flight: a frequent token has many
  for (int64_t next = piece + 1; next <= last; ++next) {
    sum.Add(LoadPack<N>(partial + (2 * next) * d + column));
  }
  sum.AddTo(dtable + token * d + column);
}

int64_t RoundUp(int64_t bytes) { return CeilDiv(bytes, kAlignment) * kAlignment; }

int TokenBits(int64_t vocab) {
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < vocab) ++bits;
  return bits;
}

// Offsets of the parts of the scratch.
struct Scratch {
  int64_t iota, token, place, partial, sort, sort_bytes, bytes;
};
Scratch LayOut(int64_t count, int64_t d, int64_t vocab) {
  size_t sort_bytes = 0;
  const int32_t* in = nullptr;
  int32_t* out = nullptr;
  cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, in, out, in, out, static_cast<int>(count), 0,
                                  TokenBits(vocab));
  Scratch s{};
  const int64_t ids = RoundUp(count * static_cast<int64_t>(sizeof(int32_t)));
  s.token = ids;
  s.place = 2 * ids;
  s.partial = 3 * ids;
  s.sort = s.partial + RoundUp(2 * CeilDiv(count, kPieceTokens) * d * static_cast<int64_t>(sizeof(float)));
  s.sort_bytes = static_cast<int64_t>(sort_bytes);
  s.bytes = s.sort + RoundUp(s.sort_bytes);
  return s;
}

template <typename T, int N>
cudaError_t AddSorted(const CudaEmbeddingBackwardArgs<T>& args, const Sorted& sorted, float* partial,
                      cudaStream_t stream) {
  const int64_t slabs = CeilDiv(args.d, int64_t{kSlabThreads} * N);
  const int64_t blocks = CeilDiv(args.token_count, kPieceTokens) * slabs;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto grid = static_cast<uint32_t>(blocks), row_slabs = static_cast<uint32_t>(slabs);
  PieceKernel<T, N>
      <<<grid, kSlabThreads, 0, stream>>>(sorted, args.d, row_slabs, args.dy, partial, args.dtable);
  CutRunKernel<N><<<grid, kSlabThreads, 0, stream>>>(sorted, args.d, row_slabs, partial, args.dtable);
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

int64_t CudaEmbeddingBackwardScratchBytes(int64_t token_count, int64_t d, int64_t vocab) {
  return LayOut(token_count, d, vocab).bytes;
}

template <typename T>
cudaError_t CudaEmbeddingBackward(const CudaEmbeddingBackwardArgs<T>& args, cudaStream_t stream) {
  if (args.token_count * args.d == 0) return cudaSuccess;
  if (args.token_count > INT32_MAX) return cudaErrorInvalidValue;
  const Scratch layout = LayOut(args.token_count, args.d, args.vocab);
  char* base = static_cast<char*>(args.scratch);
  auto* iota = reinterpret_cast<int32_t*>(base + layout.iota);
  auto* token = reinterpret_cast<int32_t*>(base + layout.token);
  auto* place = reinterpret_cast<int32_t*>(base + layout.place);
  auto* partial = reinterpret_cast<float*>(base + layout.partial);
  const int count = static_cast<int>(args.token_count);
  IotaKernel<<<static_cast<uint32_t>(CeilDiv(count, 256)), 256, 0, stream>>>(count, iota);
  auto sort_bytes = static_cast<size_t>(layout.sort_bytes);
  const cudaError_t sorted = cub::DeviceRadixSort::SortPairs(base + layout.sort, sort_bytes, args.tokens,
                                                             token, static_cast<const int32_t*>(iota), place,
                                                             count, 0, TokenBits(args.vocab), stream);
  if (sorted != cudaSuccess) return sorted;
  constexpr int kN = kVectorElements<T>;
  const bool fit = args.d % kN == 0 && Aligned(args.dy) && Aligned(args.dtable);
  const Sorted runs{count, token, place};
  return fit ? AddSorted<T, kN>(args, runs, partial, stream) : AddSorted<T, 1>(args, runs, partial, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                 \
  template cudaError_t CudaEmbeddingForward<T>(int64_t, int64_t, const int32_t*, const T*, T*, \
                                               cudaStream_t);                                  \
  template cudaError_t CudaEmbeddingBackward<T>(const CudaEmbeddingBackwardArgs<T>&, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
