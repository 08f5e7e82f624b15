// Three kernels of one form. A thread block owns kRows rows of one head, a warp each, and walks over the rows
// of the other side, queries or keys, in tiles of 32 in shared memory. For the 32 scores of a tile a lane
// takes one row of the tile; for what the row sums up, a lane takes every 32nd column:
//
//   forward   rows: queries   S = Q K^T                    O += P V
//   dQ        rows: queries   S = Q K^T   dP = dO V^T      dQ += dS K
//   dK, dV    rows: keys      S = K Q^T   dP = V dO^T      dV += P dO   dK += dS Q
//
// dK and dV sum over the query heads of the group as well.

#include "kernels/attention/attention_bounds.cuh"
#include "kernels/attention/attention_f32_cuda.h"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {
namespace {

using Block = CudaAttentionBlock<float>;
using Partial = CudaAttentionPartial<float>;
using Gradients = CudaAttentionGradients<float>;

constexpr int kRows = 8, kThreads = kRows * 32;
constexpr int kTileRows = 32;  // one per lane
constexpr int kMaxDim = 256, kColumns = kMaxDim / 32;

// A row in shared memory: zeros up to the next multiple of 32, and 4 more floats so that eight lanes which
// read 16 bytes of eight rows meet distinct banks.
__host__ __device__ constexpr int Pitch(int64_t dim) { return static_cast<int>((dim + 31) / 32 * 32 + 4); }

__device__ int Warp() { return static_cast<int>(threadIdx.x / 32); }
__device__ int Lane() { return static_cast<int>(threadIdx.x % 32); }

// Row 0 of a head.
template <typename T>
__device__ T* HeadOf(const CudaHeads<T>& x, int64_t item, int64_t head, int64_t dim) {
  return x.data + item * x.batch_stride + head * dim;
}
__device__ int64_t StatIndex(const Block& block, int64_t row, int64_t item, int64_t head) {
  return (row * block.batch + item) * block.heads + head;
}

// By a warp; zeros without a row.
__device__ void LoadRow(float* to, const float* row, int64_t dim) {
  for (int c = Lane(); c < Pitch(dim); c += 32) to[c] = row != nullptr && c < dim ? row[c] : 0;
}

// The product of a row, the same for all lanes, and this lane's row of a tile.
__device__ float Dot(const float* row, const float* tile, int64_t dim) {
  const float4* x = reinterpret_cast<const float4*>(row);
  const float4* y = reinterpret_cast<const float4*>(tile + Lane() * Pitch(dim));
  float4 sum{0, 0, 0, 0};
  for (int c = 0; 4 * c < dim; ++c) {
    sum.x = fmaf(x[c].x, y[c].x, sum.x);
    sum.y = fmaf(x[c].y, y[c].y, sum.y);
    sum.z = fmaf(x[c].z, y[c].z, sum.z);
    sum.w = fmaf(x[c].w, y[c].w, sum.w);
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

// Two tensors whose rows go together, K and V or Q and dO: dim and v_dim wide.
struct Pair {
  CudaHeads<const float> a, b;
};

// Shared memory: a tile of a pair, and the rows of the other pair that the block owns.
class Shared {
 public:
  static int Bytes(const Block& block) {
    return (kTileRows + kRows) * (Pitch(block.dim) + Pitch(block.v_dim)) * static_cast<int>(sizeof(float));
  }
  __device__ Shared(const Block& block, float* memory)
      : tile_a(memory),
        tile_b(tile_a + kTileRows * Pitch(block.dim)),
        dim_(block.dim),
        v_dim_(block.v_dim),
        own_a_(tile_b + kTileRows * Pitch(block.v_dim)),
        own_b_(own_a_ + kRows * Pitch(block.dim)) {}

  // The warp's own row.
  __device__ void LoadOwn(const Pair& from, int64_t item, int64_t head, int64_t row) const {
    LoadRows(from, item, head, row, row + 1, own_a_ + Warp() * Pitch(dim_), own_b_ + Warp() * Pitch(v_dim_));
    __syncwarp();
  }
  // Rows from `first` on, zeros from row `end` on. By all warps: they are done with the tile before, and then
  // see this one.
  __device__ void LoadTile(const Pair& from, int64_t item, int64_t head, int64_t first, int64_t end) const {
    __syncthreads();
    for (int r = Warp(); r < kTileRows; r += kRows) {
      LoadRows(from, item, head, first + r, end, tile_a + r * Pitch(dim_), tile_b + r * Pitch(v_dim_));
    }
    __syncthreads();
  }
  // The products of the warp's own row and the lane's row of the tile.
  __device__ float DotA() const { return Dot(own_a_ + Warp() * Pitch(dim_), tile_a, dim_); }
  __device__ float DotB() const { return Dot(own_b_ + Warp() * Pitch(v_dim_), tile_b, v_dim_); }

  float *const tile_a, *const tile_b;

 private:
  // A row of `a`, and one of `b` unless that is left out.
  __device__ void LoadRows(const Pair& from, int64_t item, int64_t head, int64_t row, int64_t end,
                           float* to_a, float* to_b) const {
    LoadRow(to_a, row < end ? HeadOf(from.a, item, head, dim_) + row * from.a.row_stride : nullptr, dim_);
    if (from.b.data == nullptr) return;
    LoadRow(to_b, row < end ? HeadOf(from.b, item, head, v_dim_) + row * from.b.row_stride : nullptr, v_dim_);
  }

  const int64_t dim_, v_dim_;
  float *const own_a_, *const own_b_;
};

// This lane's columns of a sum over rows of tiles.
class RowSum {
 public:
  // sum += weights of all lanes . tile
  __device__ void Add(float weight, const float* tile, int64_t dim) {
    const int pitch = Pitch(dim);
    for (int r = 0; r < kTileRows; ++r) {
      const float w = __shfl_sync(~0u, weight, r);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i * 32 < dim) sum_[i] = fmaf(w, tile[r * pitch + Lane() + i * 32], sum_[i]);
      }
    }
  }
  __device__ void Multiply(float factor) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum_[i] *= factor;
  }
  __device__ void Load(const float* row, int64_t dim) {
    ForEachColumn(dim, [&](float& sum, int64_t column) { sum = row[column]; });
  }
  __device__ void Store(float factor, float* row, int64_t dim) {
    ForEachColumn(dim, [&](float sum, int64_t column) { row[column] = factor * sum; });
  }
  __device__ void AddTo(float factor, float* row, int64_t dim) {
    ForEachColumn(dim, [&](float sum, int64_t column) { row[column] = fmaf(factor, sum, row[column]); });
  }

 private:
  template <typename Fn>
  __device__ void ForEachColumn(int64_t dim, Fn&& fn) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (Lane() + i * 32 < dim) fn(sum_[i], Lane() + i * 32);
    }
  }
  float sum_[kColumns] = {};
};

__device__ float WarpMax(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

__global__ void __launch_bounds__(kThreads) ForwardF32(const Block block, const Partial partial) {
  extern __shared__ __align__(16) float memory[];
  __shared__ KeyRows ranges[kRows];
  const Shared shared(block, memory);
  const int64_t first = int64_t{blockIdx.x} * kRows, head = blockIdx.y, item = blockIdx.z;
  const int64_t kv_head = head / (block.heads / block.kv_heads), row = first + Warp();
  const TileBounds keys = LoadKeyRows<kRows, kThreads>(block, first, item, ranges);
  const KeyRows range = ranges[Warp()];
  if (range.begin < range.end) shared.LoadOwn({block.q, {}}, item, head, row);
  const int64_t stat = StatIndex(block, row, item, head);
  float* out = HeadOf(partial.out, item, head, block.v_dim) + row * partial.out.row_stride;

  // The carry is the state (LSE, 1, O): the sum of exp(s - LSE) is one by the definition of LSE.
  float largest = row < block.q_rows ? partial.lse[stat] : -INFINITY;
  float sum = largest == -INFINITY ? 0 : 1;
  RowSum acc;
  if (sum > 0) acc.Load(out, block.v_dim);
  for (int key = keys.begin; key < keys.end; key += kTileRows) {
    shared.LoadTile({block.k, block.v}, item, kv_head, key, keys.end);
    if (key >= range.end || key + kTileRows <= range.begin) continue;
    const int at = key + Lane();
    float score = block.scale * shared.DotA();
    if (at < range.begin || at >= range.end) score = -INFINITY;
    const float before = largest;
    largest = fmaxf(before, WarpMax(score));
    const float weight = expf(score - largest), correction = expf(before - largest);
    sum = fmaf(sum, correction, WarpSum(weight));
    acc.Multiply(correction);
    acc.Add(weight, shared.tile_b, block.v_dim);
  }
  if (row >= block.q_rows) return;
  const float inverse = sum > 0 ? 1 / sum : 0;
  if (range.begin < range.end) {
    acc.Store(inverse, out, block.v_dim);
    if (Lane() == 0) partial.lse[stat] = largest + logf(sum);
  }
  if (partial.result.data == nullptr) return;
  const auto& result = partial.result;
  acc.Store(inverse, HeadOf(result, item, head, block.v_dim) + row * result.row_stride, block.v_dim);
}

// What the backward needs of a query row. Rows that saw no key at all weigh zero.
struct QueryRow {
  float lse, delta;
  __device__ QueryRow(const Block& block, const Gradients& gradients, int64_t row, int64_t item, int64_t head)
      : lse(INFINITY), delta(0) {
    if (row >= block.q_rows) return;
    const int64_t stat = StatIndex(block, row, item, head);
    if (gradients.lse[stat] == -INFINITY) return;
    lse = gradients.lse[stat];
    delta = gradients.delta[stat];
  }
};

__global__ void __launch_bounds__(kThreads) QueryGradientF32(const Block block, const Gradients gradients) {
  extern __shared__ __align__(16) float memory[];
  __shared__ KeyRows ranges[kRows];
  const Shared shared(block, memory);
  const int64_t first = int64_t{blockIdx.x} * kRows, head = blockIdx.y, item = blockIdx.z;
  const int64_t kv_head = head / (block.heads / block.kv_heads), row = first + Warp();
  const TileBounds keys = LoadKeyRows<kRows, kThreads>(block, first, item, ranges);
  const KeyRows range = ranges[Warp()];
  if (range.begin < range.end) shared.LoadOwn({block.q, gradients.dout}, item, head, row);
  const QueryRow query(block, gradients, row, item, head);
  RowSum dq;
  for (int key = keys.begin; key < keys.end; key += kTileRows) {
    shared.LoadTile({block.k, block.v}, item, kv_head, key, keys.end);
    if (key >= range.end || key + kTileRows <= range.begin) continue;
    const int at = key + Lane();
    const float score = block.scale * shared.DotA();
    const float dweight = shared.DotB();
    const bool allowed = range.begin <= at && at < range.end;
    const float dscore = allowed ? expf(score - query.lse) * (dweight - query.delta) : 0;
    dq.Add(dscore, shared.tile_a, block.dim);
  }
  if (range.begin >= range.end) return;
  dq.AddTo(block.scale, HeadOf(gradients.dq, item, head, block.dim) + row * gradients.dq.row_stride,
           block.dim);
}

__global__ void __launch_bounds__(kThreads) KeyGradientF32(const Block block, const Gradients gradients) {
  extern __shared__ __align__(16) float memory[];
  const Shared shared(block, memory);
  const int first = static_cast<int>(blockIdx.x) * kRows, row = first + Warp();
  const int64_t kv_head = blockIdx.y, item = blockIdx.z, group = block.heads / block.kv_heads;
  RowSum dk, dv;
  bool seen = false;  // by any query
  for (int64_t tile = 0; tile < block.q_rows; tile += kTileRows) {
    // Every warp holds the ranges of the same 32 queries: all skip a tile or none.
    const int64_t at = tile + Lane();
    const KeyRows range = at < block.q_rows ? AllowedKeyRows(block, at, item) : KeyRows{0, 0};
    if (!__any_sync(~0u, range.begin < first + kRows && first < range.end)) continue;
    const bool allowed = range.begin <= row && row < range.end;
    const bool any_allowed = __any_sync(~0u, allowed);
    if (any_allowed && !seen) shared.LoadOwn({block.k, block.v}, item, kv_head, row);
    seen = seen || any_allowed;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      shared.LoadTile({block.q, gradients.dout}, item, head, tile, block.q_rows);
      if (!any_allowed) continue;
      const float score = block.scale * shared.DotA();
      const float dweight = shared.DotB();
      const QueryRow query(block, gradients, at, item, head);
      const float weight = allowed ? expf(score - query.lse) : 0;
      dv.Add(weight, shared.tile_b, block.v_dim);
      dk.Add(allowed ? weight * (dweight - query.delta) : 0, shared.tile_a, block.dim);
    }
  }
  if (!seen) return;
  const CudaHeads<float>&to_k = gradients.dk, &to_v = gradients.dv;
  dk.AddTo(block.scale, HeadOf(to_k, item, kv_head, block.dim) + row * to_k.row_stride, block.dim);
  dv.AddTo(1, HeadOf(to_v, item, kv_head, block.v_dim) + row * to_v.row_stride, block.v_dim);
}

constexpr int64_t kMaxGrid = 65535, kMaxRows = INT32_MAX - 1024;

bool Valid(const Block& block) {
  return F32AttentionSupports(block.dim, block.v_dim) && 0 <= block.q_rows && block.q_rows <= kMaxRows &&
         0 <= block.k_rows && block.k_rows <= kMaxRows && 0 <= block.batch && block.batch <= kMaxGrid &&
         0 <= block.heads && block.heads <= kMaxGrid &&
         (block.heads == 0 || (block.kv_heads > 0 && block.heads % block.kv_heads == 0)) &&
         block.key_offset >= 0 && block.key_stride >= 1;
}

template <typename Args>
cudaError_t Launch(void (*kernel)(Block, Args), int64_t rows, int64_t heads, const Block& block,
                   const Args& args, cudaStream_t stream) {
  if (rows == 0 || heads == 0 || block.batch == 0) return cudaSuccess;
  const int bytes = Shared::Bytes(block);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(CeilDiv(rows, kRows)), static_cast<unsigned>(heads),
                  static_cast<unsigned>(block.batch));
  kernel<<<grid, kThreads, bytes, stream>>>(block, args);
  return cudaGetLastError();
}

}  // namespace

bool F32AttentionSupports(int64_t dim, int64_t v_dim) {
  return 1 <= dim && dim <= kMaxDim && 1 <= v_dim && v_dim <= kMaxDim;
}

cudaError_t F32AttentionForward(const Block& block, const Partial& partial, cudaStream_t stream) {
  if (!Valid(block)) return cudaErrorInvalidValue;
  return Launch(ForwardF32, block.q_rows, block.heads, block, partial, stream);
}

cudaError_t F32AttentionBackward(const Block& block, const Gradients& gradients, cudaStream_t stream) {
  if (!Valid(block)) return cudaErrorInvalidValue;
  if (block.heads == 0) return cudaSuccess;
  const cudaError_t error = Launch(QueryGradientF32, block.q_rows, block.heads, block, gradients, stream);
  if (error != cudaSuccess) return error;
  return Launch(KeyGradientF32, block.k_rows, block.kv_heads, block, gradients, stream);
}

}  // namespace annulus::kernels
