// Tables of the backward on tensor cores, and how its work is shared out.
//
// A thread block of the backward starts, reads keys and adds up dK and dV in about the time of kStartTiles
// query tiles; the device is done when its last one is. With W query tiles for each multiprocessor in shares
// of n that is about
//
//   W + kStartTiles W / n + n        least at n = sqrt(kStartTiles W)
//
// Documents and causal masks make walks of all lengths, and the longest shares come first (Graham 1969): by
// classes of half octaves. In a class those of one KV head stand together, so that they meet the same queries
// at about the same time.

#include <algorithm>
#include <cmath>

#include "attention_mma_launch.cuh"
#include "kernels/common/hopper.cuh"
#include "mma_primitives.cuh"

namespace annulus::kernels {
namespace {

constexpr float kStartTiles = 4;
constexpr float kShortestShare = 2;
// Shares per multiprocessor, on average, of tiles of keys that are cut: in a fixed order each takes memory.
constexpr float kMostShares = 16, kMostOrderedShares = 4;
constexpr int kThreads = 256, kScanThreads = 1024, kClasses = 32;

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// How long shares should be, in query tiles, of so many in all.
struct ShareLength {
  float multiprocessors, most_shares;

  __host__ __device__ float operator()(float tiles) const {
    const float each = tiles / multiprocessors;
    return fmaxf(fmaxf(kShortestShare, sqrtf(kStartTiles * each)), each / most_shares);
  }
};

// Sizes of the tables, and where they begin in the workspace.
struct Layout {
  int64_t padded_rows, query_tiles, key_tiles, most_shares, slots = 0;
  ShareLength share_length;
  int64_t ranges, bounds, work, shares, turns, sums, bytes;

  Layout(const MmaAttentionBlock& block, const BackwardTableShape& shape, int multiprocessors) {
    const bool ordered = shape.query_gradient == MmaQueryGradient::kOrdered;
    const int64_t queries = shape.queries;
    padded_rows = RoundUp(block.q_rows, queries);
    query_tiles = padded_rows / queries;
    key_tiles = RoundUp(block.k_rows, kBackwardKeys) / kBackwardKeys;
    share_length = {static_cast<float>(multiprocessors), ordered ? kMostOrderedShares : kMostShares};
    // As many shares as there are where every key tile meets every query tile: fewer query tiles have shorter
    // shares, but not more of them. A share count is rounded to nearest, and one at least; from two on it is
    // at most 4/3 of what it was.
    const int64_t all_key_tiles = block.batch * key_tiles;
    const float tiles = static_cast<float>(all_key_tiles * block.heads * query_tiles);
    const auto cut = static_cast<int64_t>(tiles / share_length(tiles)) + 1;
    most_shares = all_key_tiles * block.kv_heads + cut;
    if (ordered) slots = cut * 4 / 3 / std::max<int64_t>(1, block.kv_heads) + 1;
    ranges = block.batch * block.heads * padded_rows * static_cast<int64_t>(sizeof(RowStats));
    bounds = ranges + block.batch * padded_rows * static_cast<int64_t>(sizeof(KeyRows));
    work = bounds + block.batch * query_tiles * static_cast<int64_t>(sizeof(TileBounds));
    shares = work + all_key_tiles * static_cast<int64_t>(sizeof(KeyTileWork));
    turns = shares + most_shares * static_cast<int64_t>(sizeof(BackwardShare));
    const int64_t turn_count =
        shape.order == ShareOrder::kKeys ? 2 * block.batch * block.heads * query_tiles : 0;
    sums = RoundUp(turns + turn_count * static_cast<int64_t>(sizeof(int)), 16);
    bytes = sums + block.kv_heads * slots * kBackwardKeys * (block.dim + block.v_dim) *
                       static_cast<int64_t>(sizeof(float));
  }
};

cudaError_t CountMultiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Of one query tile.
template <int kQueries>
__global__ void FillRows(const __grid_constant__ MmaAttentionBlock block, const float* lse,
                         const float* delta, int64_t padded_rows, RowStats* stats, KeyRows* ranges,
                         TileBounds* bounds) {
  __shared__ KeyRows shared[kQueries];
  const int64_t first = int64_t{blockIdx.x} * kQueries, item = blockIdx.y;
  const TileBounds all = LoadKeyRows<kQueries, kThreads>(block, first, item, shared);
  if (threadIdx.x < kQueries) ranges[item * padded_rows + first + threadIdx.x] = shared[threadIdx.x];
  if (threadIdx.x == 0) bounds[item * gridDim.x + blockIdx.x] = all;
  const int64_t row = first + threadIdx.x % kQueries;
  for (int64_t head = threadIdx.x / kQueries; head < block.heads; head += kThreads / kQueries) {
    RowStats to{kInfinity, 0};
    if (row < block.q_rows) {
      const int64_t from = (row * block.batch + item) * block.heads + head;
      if (lse[from] != -kInfinity) to = {fmaf(lse[from], kLog2E, -kWeightExponent), delta[from]};
    }
    stats[(item * block.heads + head) * padded_rows + row] = to;
  }
}

// Of one tile of keys, its shares left out.
__global__ void FillWork(const TileBounds* bounds, int query_tiles, KeyTileWork* work) {
  __shared__ KeyTileWork warps[kThreads / 32];
  const int key = static_cast<int>(blockIdx.x) * kBackwardKeys, item = static_cast<int>(blockIdx.y);
  bounds += int64_t{item} * query_tiles;
  KeyTileWork all{.first = INT_MAX, .last = 0, .begin = INT_MAX, .end = 0, .shares = 0, .slot = 0};
  for (int tile = static_cast<int>(threadIdx.x); tile < query_tiles; tile += kThreads) {
    const TileBounds bound = bounds[tile];
    if (!bound.Touches(key, key + kBackwardKeys)) continue;
    all.first = min(all.first, tile), all.last = tile + 1;
    all.begin = min(all.begin, bound.begin), all.end = max(all.end, bound.end);
  }
  all.first = __reduce_min_sync(~0u, all.first), all.last = __reduce_max_sync(~0u, all.last);
  all.begin = __reduce_min_sync(~0u, all.begin), all.end = __reduce_max_sync(~0u, all.end);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; ++w) {
    all.first = min(all.first, warps[w].first), all.last = max(all.last, warps[w].last);
    all.begin = min(all.begin, warps[w].begin), all.end = max(all.end, warps[w].end);
  }
  if (all.first >= all.last) all.first = all.last = 0;
  all.begin = max(all.begin - key, 0), all.end = min(all.end - key, kBackwardKeys);
  work[item * gridDim.x + blockIdx.x] = all;
}

// Sums over the threads before this one and over all; kScanThreads threads call it.
struct Scan {
  long long before, all;
};
__device__ Scan ScanBlock(long long value) {
  __shared__ long long warps[kScanThreads / 32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const auto through = [lane](long long x) {
    for (int step = 1; step < 32; step *= 2) {
      const long long other = __shfl_up_sync(~0u, x, step);
      if (lane >= step) x += other;
    }
    return x;
  };
  const long long in_warp = through(value);
  __syncthreads();  // the call before has read
  if (lane == 31) warps[warp] = in_warp;
  __syncthreads();
  const long long of_warps = through(warps[lane]);
  const long long until = __shfl_sync(~0u, of_warps, warp), of_warp = __shfl_sync(~0u, warps[lane], warp);
  return {until - of_warp + in_warp - value, __shfl_sync(~0u, of_warps, 31)};
}
static_assert(kScanThreads == 32 * 32);

// What there is to share out, and the list of shares that is made of it.
struct ShareList {
  int key_tiles, kv_heads, group;
  ShareOrder order;
  ShareLength length;
  int most_shares;
  BackwardShare* shares;
};

// Places the shares of tile t, each thread another, behind `place`; how many there are of all threads.
__device__ int PlaceShares(const ShareList& list, int t, int count, int place) {
  const Scan scan = ScanBlock(count * list.kv_heads);
  BackwardShare* to = list.shares + place + scan.before;
  for (int head = 0; head < list.kv_heads; ++head) {
    for (int i = 0; i < count; ++i) *to++ = {t, head, i};
  }
  return static_cast<int>(scan.all);
}

// There are no more than `all`.
__device__ void EndShares(const ShareList& list, int all) {
  for (int s = all + static_cast<int>(threadIdx.x); s < list.most_shares; s += kScanThreads) {
    list.shares[s] = {-1, 0, 0};
  }
}

// By one thread block.
__global__ void FillShares(KeyTileWork* work, const __grid_constant__ ShareList list) {
  __shared__ int of_class[kClasses], taken[kClasses], longest;  // shares of one KV head; query tiles
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kClasses) of_class[thread] = taken[thread] = 0;
  if (thread == 0) longest = 1;
  const auto tiles_of = [&](int t) { return (work[t].last - work[t].first) * list.group; };
  long long tiles = 0;
  for (int t = thread; t < list.key_tiles; t += kScanThreads) tiles += tiles_of(t);
  const float length = list.length(static_cast<float>(ScanBlock(tiles * list.kv_heads).all));
  int slot = 0, place = 0;  // of the key tiles before
  for (int begin = 0; begin < list.key_tiles; begin += kScanThreads) {
    const int t = begin + thread, of_tile = t < list.key_tiles ? tiles_of(t) : 0;
    const int count = of_tile == 0 ? 0 : max(1, __float2int_rn(static_cast<float>(of_tile) / length));
    const Scan scan = ScanBlock(count > 1 ? count : 0);
    if (t < list.key_tiles) {
      work[t].shares = count;
      work[t].slot = slot + static_cast<int>(scan.before);
      if (count > 0) atomicMax(&longest, of_tile / count);
    }
    slot += static_cast<int>(scan.all);
    if (list.order == ShareOrder::kKeys) place += PlaceShares(list, t, count, place);
  }
  if (list.order == ShareOrder::kKeys) {
    EndShares(list, place);
    return;
  }
  __syncthreads();
  const auto class_of = [&](int t) {
    const float shorter = static_cast<float>(longest) / static_cast<float>(tiles_of(t) / work[t].shares);
    return min(static_cast<int>(2 * log2f(shorter)), kClasses - 1);
  };
  for (int t = thread; t < list.key_tiles; t += kScanThreads) {
    if (work[t].shares > 0) atomicAdd(&of_class[class_of(t)], work[t].shares);
  }
  __syncthreads();
  const Scan scan = ScanBlock(thread < kClasses ? of_class[thread] : 0);
  __shared__ int first[kClasses];  // of all KV heads
  if (thread < kClasses) first[thread] = static_cast<int>(scan.before) * list.kv_heads;
  __syncthreads();
  for (int t = thread; t < list.key_tiles; t += kScanThreads) {
    const int count = work[t].shares;
    if (count == 0) continue;
    const int c = class_of(t), place = first[c] + atomicAdd(&taken[c], count);
    for (int head = 0; head < list.kv_heads; ++head) {
      for (int i = 0; i < count; ++i) list.shares[place + head * of_class[c] + i] = {t, head, i};
    }
  }
  EndShares(list, static_cast<int>(scan.all) * list.kv_heads);
}

// Of some rows of one tile of keys of one KV head.
__global__ void AddSums(const __grid_constant__ MmaAttentionBlock block,
                        const __grid_constant__ MmaAttentionGradients gradients,
                        const __grid_constant__ BackwardTables tables) {
  const KeyTileWork work = tables.work[blockIdx.x];
  if (work.shares < 2) return;
  const int64_t item = blockIdx.x / tables.key_tiles, kv_head = blockIdx.y,
                key = int64_t{blockIdx.x % tables.key_tiles} * kBackwardKeys;
  const int dim = static_cast<int>(block.dim), width = dim + static_cast<int>(block.v_dim);
  const float* sums = tables.sums + (kv_head * tables.slots + work.slot) * kBackwardKeys * width;
  const int rows = kBackwardKeys / static_cast<int>(gridDim.z), from = static_cast<int>(blockIdx.z) * rows;
  for (int i = static_cast<int>(threadIdx.x); i < rows * width / 4; i += kThreads) {
    const int row = from + i / (width / 4), column = i % (width / 4) * 4;
    if (row < work.begin || row >= work.end) continue;
    const bool of_key = column < dim;
    const auto& x = of_key ? gradients.dk : gradients.dv;
    float4* to =
        reinterpret_cast<float4*>(x.data + (key + row) * x.row_stride + item * x.batch_stride +
                                  (of_key ? kv_head * dim + column : kv_head * block.v_dim + column - dim));
    float4 sum = *to;
#pragma unroll 4
    for (int share = 0; share < work.shares; ++share) {
      const float4 part =
          *reinterpret_cast<const float4*>(sums + (int64_t{share} * kBackwardKeys + row) * width + column);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *to = sum;
  }
}

}  // namespace

int64_t BackwardTableBytes(const MmaAttentionBlock& block, const BackwardTableShape& shape) {
  int multiprocessors = 0;
  if (CountMultiprocessors(&multiprocessors) != cudaSuccess) return 0;  // the launch will say so again
  return Layout(block, shape, multiprocessors).bytes;
}

cudaError_t FillBackwardTables(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                               const BackwardTableShape& shape, void* workspace, BackwardTables* tables,
                               cudaStream_t stream) {
  int multiprocessors = 0;
  cudaError_t error = CountMultiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const Layout layout(block, shape, multiprocessors);
  auto* memory = static_cast<char*>(workspace);
  auto* stats = reinterpret_cast<RowStats*>(memory);
  auto* ranges = reinterpret_cast<KeyRows*>(memory + layout.ranges);
  auto* bounds = reinterpret_cast<TileBounds*>(memory + layout.bounds);
  auto* work = reinterpret_cast<KeyTileWork*>(memory + layout.work);
  auto* shares = reinterpret_cast<BackwardShare*>(memory + layout.shares);
  auto* turns = reinterpret_cast<int*>(memory + layout.turns);
  *tables = {.stats = stats,
             .ranges = ranges,
             .bounds = bounds,
             .work = work,
             .shares = shares,
             .turns = turns,
             .sums = reinterpret_cast<float*>(memory + layout.sums),
             .padded_rows = layout.padded_rows,
             .query_tiles = static_cast<int>(layout.query_tiles),
             .key_tiles = static_cast<int>(layout.key_tiles),
             .most_shares = static_cast<int>(layout.most_shares),
             .slots = static_cast<int>(layout.slots)};
  const auto batch = static_cast<unsigned>(block.batch);
  const auto fill = shape.queries == 32 ? FillRows<32> : shape.queries == 64 ? FillRows<64> : FillRows<128>;
  error = LaunchKernel(fill, dim3(static_cast<unsigned>(layout.query_tiles), batch), kThreads, 0, stream,
                       block, gradients.lse, gradients.delta, layout.padded_rows, stats, ranges, bounds);
  if (error != cudaSuccess) return error;
  error = LaunchKernel(FillWork, dim3(static_cast<unsigned>(layout.key_tiles), batch), kThreads, 0, stream,
                       bounds, tables->query_tiles, work);
  if (error != cudaSuccess) return error;
  const ShareList list{.key_tiles = static_cast<int>(block.batch * layout.key_tiles),
                       .kv_heads = static_cast<int>(block.kv_heads),
                       .group = static_cast<int>(block.heads / block.kv_heads),
                       .order = shape.order,
                       .length = layout.share_length,
                       .most_shares = tables->most_shares,
                       .shares = shares};
  error = LaunchKernel(FillShares, dim3(1), kScanThreads, 0, stream, work, list);
  if (error != cudaSuccess || shape.order != ShareOrder::kKeys) return error;
  return cudaMemsetAsync(turns, 0, static_cast<size_t>(layout.sums - layout.turns), stream);
}

cudaError_t AddShares(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                      const BackwardTables& tables, cudaStream_t stream) {
  constexpr unsigned kParts = 8;  // of a tile, so that a few tiles occupy the device
  const dim3 grid(static_cast<unsigned>(block.batch * tables.key_tiles),
                  static_cast<unsigned>(block.kv_heads), kParts);
  return LaunchKernel(AddSums, grid, kThreads, 0, stream, block, gradients, tables);
}

}  // namespace annulus::kernels
