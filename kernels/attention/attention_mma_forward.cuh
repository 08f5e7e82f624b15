#pragma once

// Forward of block attention on tensor cores (FlashAttention-2, Dao 2023, with a carry). One thread block
// owns 128 query rows of one head and walks over key tiles; a warp owns 32 query rows.
//
// State per query row, in units of log2: max, sum of 2^(score - max), and acc = the sum's weighted values. It
// starts from the carry as (LSE, 1, O): the sum of exp(s - LSE) is one by the definition of LSE.
//
// Floor: 2 (dim + v_dim) FLOP per visible (query, key) pair and head.

#include "attention_mma_launch.cuh"
#include "attention_mma_products.cuh"

namespace annulus::kernels {

template <int kDim_, int kValueDim_, int kKeys_, int kStages_, int kBlocks_ = 2>
struct ForwardTile {
  static constexpr int kDim = kDim_, kValueDim = kValueDim_;
  static constexpr int kQueries = 128, kKeys = kKeys_;
  static constexpr int kStages = kStages_;  // buffers for K and V: 2 need one barrier per key tile, 1 two
  static constexpr int kBlocks = kBlocks_;  // thread blocks that fit a multiprocessor's registers
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static_assert(kQueries == TensorCoreForwardTiles(kDim).queries &&
                kBlocks == TensorCoreForwardTiles(kDim).walks_per_multiprocessor);
  using Q = SharedTile<kQueries, kDim>;
  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  static constexpr int kSharedBytes = Q::kBytes + kStages * (K::kBytes + V::kBytes);
};

template <typename Tile>
class ForwardRows {
 public:
  __device__ ForwardRows(const MmaAttentionBlock& block, const MmaAttentionPartial& partial, int64_t first,
                         const KeyRows* ranges)
      : block_(block),
        partial_(partial),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_row_(static_cast<int>(threadIdx.x / 32 * 32)),
        first_(first),
        ranges_(ranges) {}

  __device__ void Load() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_ + Row(i, half);
        const float lse = row < block_.q_rows ? partial_.lse[StatIndex(row)] : -kInfinity;
        const bool seen = lse != -kInfinity;
        max_[i][half] = lse * kLog2E;
        sum_[i][half] = seen && lane_ % 4 == 0 ? 1 : 0;  // summed over the quad at the end
        const float* out = OutRow(partial_.out, row);
#pragma unroll
        for (int n = 0; n < Tile::kValueDim / 8; ++n) {
          const float2 value = seen ? *reinterpret_cast<const float2*>(out + n * 8) : float2{0, 0};
          acc_[i][n][2 * half] = value.x;
          acc_[i][n][2 * half + 1] = value.y;
        }
      }
    }
  }

  // scores = Q K^T of a key tile.
  __device__ void Score(uint32_t q, uint32_t k) {
    MultiplyTransposed<typename Tile::Q, typename Tile::K, 2, Tile::kKeys, Tile::kDim>(
        scores_, q + Tile::Q::LaneOffset(lane_, warp_row_), k + Tile::K::CrossedLaneOffset(lane_));
  }

  // Scores outside the rows' ranges become -inf; `key` is the key row of the tile's first column.
  __device__ void Mask(int key) {
    key += lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRows range = ranges_[Row(i, half)];
        const auto first = static_cast<unsigned>(key - range.begin);
        const auto size = static_cast<unsigned>(range.end - range.begin);
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          for (int c = 0; c < 2; ++c) {
            if (first + static_cast<unsigned>(n * 8 + c) >= size) {
              scores_[i][n][2 * half + c] = -kInfinity;
            }
          }
        }
      }
    }
  }

  // Scores become weights relative to the maximum so far.
  __device__ void Weigh() {
    const float scale = block_.scale * kLog2E;
    float corrections[2][2];
    bool same = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = scores_[i][0][2 * half];
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          largest = fmaxf(largest, fmaxf(scores_[i][n][2 * half], scores_[i][n][2 * half + 1]));
        }
        const float old = max_[i][half];
        max_[i][half] = fmaxf(old, QuadMax(largest) * scale);
        // A row that has not seen any key keeps -inf, and weights of zero.
        const float base = max_[i][half] == -kInfinity ? 0 : max_[i][half];
        float sum = 0;
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            scores_[i][n][c] = Exp2(fmaf(scores_[i][n][c], scale, -base));
            sum += scores_[i][n][c];
          }
        }
        corrections[i][half] = Exp2(old - base);
        same = same && old == max_[i][half];
        sum_[i][half] = fmaf(sum_[i][half], corrections[i][half], sum);
      }
    }
    // Maxima settle after a few tiles: most tiles need no correction of acc.
    if (__all_sync(~0u, same)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < Tile::kValueDim / 8; ++n) {
        for (int c = 0; c < 4; ++c) acc_[i][n][c] *= corrections[i][c / 2];
      }
    }
  }

  // acc += weights V.
  __device__ void AddValues(uint32_t v) {
    AddProduct<typename Tile::V, 2, Tile::kValueDim, Tile::kKeys>(acc_, scores_,
                                                                  v + Tile::V::LaneOffset(lane_));
  }

  // Rows that saw no key of the block are not written, except to the rounded result.
  __device__ void Store() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_ + Row(i, half);
        const float sum = QuadSum(sum_[i][half]);
        if (row >= block_.q_rows) continue;
        const float inverse = sum > 0 ? 1 / sum : 0;
        const KeyRows range = ranges_[Row(i, half)];
        if (range.begin < range.end) {
          float* out = OutRow(partial_.out, row);
#pragma unroll
          for (int n = 0; n < Tile::kValueDim / 8; ++n) {
            *reinterpret_cast<float2*>(out + n * 8) = {acc_[i][n][2 * half] * inverse,
                                                       acc_[i][n][2 * half + 1] * inverse};
          }
          if (lane_ % 4 == 0) partial_.lse[StatIndex(row)] = (max_[i][half] + log2f(sum)) * kLn2;
        }
        if (partial_.result.data == nullptr) continue;
        __nv_bfloat16* result = OutRow(partial_.result, row);
#pragma unroll
        for (int n = 0; n < Tile::kValueDim / 8; ++n) {
          *reinterpret_cast<uint32_t*>(result + n * 8) =
              PackBf16(acc_[i][n][2 * half] * inverse, acc_[i][n][2 * half + 1] * inverse);
        }
      }
    }
  }

 private:
  __device__ int Row(int i, int half) const { return warp_row_ + i * 16 + half * 8 + lane_ / 4; }
  __device__ int64_t StatIndex(int64_t row) const {
    return (row * block_.batch + blockIdx.z) * block_.heads + blockIdx.y;
  }
  template <typename T>
  __device__ T* OutRow(const CudaHeads<T>& x, int64_t row) const {
    return x.data + row * x.row_stride + blockIdx.z * x.batch_stride + blockIdx.y * Tile::kValueDim +
           lane_ % 4 * 2;
  }

  const MmaAttentionBlock& block_;
  const MmaAttentionPartial& partial_;
  const int lane_, warp_row_;
  const int64_t first_;
  const KeyRows* const ranges_;
  Fragments<2, Tile::kValueDim> acc_;
  Fragments<2, Tile::kKeys> scores_;
  float max_[2][2], sum_[2][2];
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    AttentionForwardMma(const __grid_constant__ MmaAttentionBlock block,
                        const __grid_constant__ MmaAttentionPartial partial) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ KeyRows ranges[Tile::kQueries];
  const uint32_t q_tile = SharedAddress(shared), k_tiles = q_tile + Tile::Q::kBytes,
                 v_tiles = k_tiles + Tile::kStages * Tile::K::kBytes;
  // Under a causal mask later tiles see more keys: the longest first.
  const int64_t first = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  const int64_t head = blockIdx.y, item = blockIdx.z, kv_head = head / (block.heads / block.kv_heads);

  Tile::Q::template Load<Tile::kThreads>(
      q_tile, block.q.data + first * block.q.row_stride + item * block.q.batch_stride + head * Tile::kDim,
      block.q.row_stride, 0, static_cast<int>(min(int64_t{Tile::kQueries}, block.q_rows - first)));
  const TileBounds keys = LoadKeyRows<Tile::kQueries, Tile::kThreads>(block, first, item, ranges);
  CopyAsyncCommit();
  if (keys.empty() && partial.result.data == nullptr) {
    CopyAsyncWait<0>();
    return;
  }

  // Key tiles start at the first visible key; rows from keys.end on are not read.
  const __nv_bfloat16* k = block.k.data + item * block.k.batch_stride + kv_head * Tile::kDim;
  const __nv_bfloat16* v = block.v.data + item * block.v.batch_stride + kv_head * Tile::kValueDim;
  const auto load_k = [&](int key, int stage) {
    Tile::K::template Load<Tile::kThreads>(k_tiles + static_cast<uint32_t>(stage * Tile::K::kBytes),
                                           k + key * block.k.row_stride, block.k.row_stride, 0,
                                           keys.end - key);
  };
  const auto load_v = [&](int key, int stage) {
    Tile::V::template Load<Tile::kThreads>(v_tiles + static_cast<uint32_t>(stage * Tile::V::kBytes),
                                           v + key * block.v.row_stride, block.v.row_stride, 0,
                                           keys.end - key);
  };
  if (!keys.empty()) {
    load_k(keys.begin, 0);
    if (Tile::kStages == 2) load_v(keys.begin, 0);
  }
  CopyAsyncCommit();

  ForwardRows<Tile> rows(block, partial, first, ranges);
  rows.Load();
  int stage = 0;
  for (int key = keys.begin; key < keys.end; key += Tile::kKeys) {
    const int next = key + Tile::kKeys;
    // This tile has landed, and every warp is done with the one before.
    CopyAsyncWait<0>();
    __syncthreads();
    if constexpr (Tile::kStages == 2) {
      if (next < keys.end) {
        load_k(next, stage ^ 1);
        load_v(next, stage ^ 1);
      }
    } else {
      load_v(key, 0);
    }
    CopyAsyncCommit();
    rows.Score(q_tile, k_tiles + static_cast<uint32_t>(stage * Tile::K::kBytes));
    if constexpr (Tile::kStages == 1) {
      CopyAsyncWait<0>();
      __syncthreads();
      if (next < keys.end) load_k(next, 0);
      CopyAsyncCommit();
    }
    if (keys.Masks(key, next)) rows.Mask(key);
    rows.Weigh();
    rows.AddValues(v_tiles + static_cast<uint32_t>(stage * Tile::V::kBytes));
    if constexpr (Tile::kStages == 2) stage ^= 1;
  }
  rows.Store();
}

template <typename Tile>
cudaError_t LaunchForward(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                          cudaStream_t stream) {
  const auto kernel = AttentionForwardMma<Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((block.q_rows + Tile::kQueries - 1) / Tile::kQueries),
                  static_cast<unsigned>(block.heads), static_cast<unsigned>(block.batch));
  kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(block, partial);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
