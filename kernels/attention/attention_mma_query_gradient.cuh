#pragma once

// dQ of block attention over query tiles: the second kernel of a backward whose sums have a fixed order. One
// thread block owns 128 query rows of one head, a warp 16 or 32 of them, and walks over the key tiles they
// see:
//
//   P = exp(Q K^T - LSE)   dS = P (dO V^T - delta)   dQ += dS K
//
// dS, rounded, is the left operand of dQ without leaving registers.

#include "attention_mma_launch.cuh"
#include "attention_mma_products.cuh"

namespace annulus::kernels {

template <int kDim_, int kValueDim_>
struct QueryGradientTile {
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kQueries = 128;
  // dQ, scores and dP of a warp's 16 kM rows fit its registers.
  static constexpr int kM = kDim > 128 ? 1 : 2, kKeys = kM == 2 ? 32 : 64;
  static constexpr int kThreads = kQueries / (16 * kM) * 32, kBlocks = kM;
  using Q = SharedTile<kQueries, kDim>;
  using DOut = SharedTile<kQueries, kValueDim>;
  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  static constexpr int kStageBytes = K::kBytes + V::kBytes;
  static constexpr int kSharedBytes = Q::kBytes + DOut::kBytes + 2 * kStageBytes;
};

template <typename Tile>
class QueryGradientRows {
 public:
  // `stats` and `ranges` are of row 0 of the tile, `rows` of which exist.
  __device__ QueryGradientRows(uint32_t shared, const RowStats* stats, const KeyRows* ranges, int rows)
      : lane_(static_cast<int>(threadIdx.x % 32)),
        row_(static_cast<int>(threadIdx.x / 32 * 16 * Tile::kM)),
        q_lane_(shared + Tile::Q::LaneOffset(lane_, row_)),
        dout_lane_(shared + Tile::Q::kBytes + Tile::DOut::LaneOffset(lane_, row_)),
        ranges_(ranges + row_ + lane_ / 4) {
    Clear(dq_);
#pragma unroll
    for (int half = 0; half < 2 * Tile::kM; ++half) {
      const int row = row_ + lane_ / 4 + half * 8;
      stats_[half] = row < rows ? stats[row] : RowStats{kInfinity, 0};
    }
  }

  __device__ void Score(uint32_t k, uint32_t v) {
    MultiplyTransposed<typename Tile::Q, typename Tile::K, Tile::kM, Tile::kKeys, Tile::kDim>(
        weights_, q_lane_, k + Tile::K::CrossedLaneOffset(lane_));
    MultiplyTransposed<typename Tile::DOut, typename Tile::V, Tile::kM, Tile::kKeys, Tile::kValueDim>(
        dscores_, dout_lane_, v + Tile::V::CrossedLaneOffset(lane_));
  }

  // Scores and dP become P and dS; `key` is the key row of the tile's first key.
  template <bool kMasked>
  __device__ void Differentiate(float scale, int key) {
    key += lane_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2 * Tile::kM; ++half) {
      KeyRows range;
      if (kMasked) range = ranges_[half * 8];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
        for (int c = half % 2 * 2; c < half % 2 * 2 + 2; ++c) {
          float weight = Exp2(fmaf(weights_[half / 2][n][c], scale, -stats_[half].lse));
          if (kMasked) {
            const int at = key + n * 8 + c % 2;
            if (at < range.begin || at >= range.end) weight = 0;
          }
          float& dscore = dscores_[half / 2][n][c];
          dscore = weight * (dscore - stats_[half].delta);
        }
      }
    }
  }

  __device__ void AddQueryGradients(uint32_t k) {
    AddProduct<typename Tile::K, Tile::kM, Tile::kDim, Tile::kKeys>(dq_, dscores_,
                                                                    k + Tile::K::LaneOffset(lane_));
  }

  __device__ void Store(float scale, const GradientRows& dq) {
    WriteRows(dq_, scale * kUnscaleWeight, row_, dq);
  }

 private:
  const int lane_, row_;
  const uint32_t q_lane_, dout_lane_;
  const KeyRows* const ranges_;  // of the lane's first row
  RowStats stats_[2 * Tile::kM];
  Fragments<Tile::kM, Tile::kKeys> weights_, dscores_;
  Fragments<Tile::kM, Tile::kDim> dq_;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    AttentionQueryGradientMma(const __grid_constant__ MmaAttentionBlock block,
                              const __grid_constant__ MmaAttentionGradients gradients,
                              const __grid_constant__ BackwardTables tables) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ KeyRows ranges[Tile::kQueries];
  const uint32_t base = SharedAddress(shared);
  constexpr int kStages = Tile::Q::kBytes + Tile::DOut::kBytes;
  // Under a causal mask later tiles see more keys: the longest first.
  const int64_t first = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  const int64_t head = blockIdx.y, item = blockIdx.z, kv_head = head / (block.heads / block.kv_heads);
  const int rows = static_cast<int>(min(int64_t{Tile::kQueries}, block.q_rows - first));
  const TileBounds keys = LoadKeyRows<Tile::kQueries, Tile::kThreads>(block, first, item, ranges);
  if (keys.empty()) return;

  const auto &q = block.q, &dout = gradients.dout;
  Tile::Q::template Load<Tile::kThreads>(
      base, q.data + first * q.row_stride + item * q.batch_stride + head * Tile::kDim, q.row_stride, 0, rows);
  Tile::DOut::template Load<Tile::kThreads>(
      base + Tile::Q::kBytes,
      dout.data + first * dout.row_stride + item * dout.batch_stride + head * Tile::kValueDim,
      dout.row_stride, 0, rows);
  // Key tiles start at the first visible key; rows from keys.end on are not read.
  const auto load = [&](int key, int stage) {
    const uint32_t to = base + kStages + static_cast<uint32_t>(stage * Tile::kStageBytes);
    const auto &k = block.k, &v = block.v;
    Tile::K::template Load<Tile::kThreads>(
        to, k.data + key * k.row_stride + item * k.batch_stride + kv_head * Tile::kDim, k.row_stride, 0,
        keys.end - key);
    Tile::V::template Load<Tile::kThreads>(
        to + Tile::K::kBytes, v.data + key * v.row_stride + item * v.batch_stride + kv_head * Tile::kValueDim,
        v.row_stride, 0, keys.end - key);
  };
  load(keys.begin, 0);
  CopyAsyncCommit();

  QueryGradientRows<Tile> gradient(
      base, tables.stats + (item * block.heads + head) * tables.padded_rows + first, ranges, rows);
  const float scale = block.scale * kLog2E;
  int stage = 0;
  for (int key = keys.begin; key < keys.end; key += Tile::kKeys, stage ^= 1) {
    const int next = key + Tile::kKeys;
    // This tile has landed, and every warp is done with the one before.
    CopyAsyncWait<0>();
    __syncthreads();
    if (next < keys.end) load(next, stage ^ 1);
    CopyAsyncCommit();
    const uint32_t k = base + kStages + static_cast<uint32_t>(stage * Tile::kStageBytes);
    gradient.Score(k, k + Tile::K::kBytes);
    if (keys.Masks(key, next)) {
      gradient.template Differentiate<true>(scale, key);
    } else {
      gradient.template Differentiate<false>(scale, key);
    }
    gradient.AddQueryGradients(k);
  }
  const auto& dq = gradients.dq;
  gradient.Store(block.scale, {dq.data + first * dq.row_stride + item * dq.batch_stride + head * Tile::kDim,
                               dq.row_stride, 0, rows});
}

template <typename Tile>
cudaError_t LaunchQueryGradient(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                const BackwardTables& tables, cudaStream_t stream) {
  const auto kernel = AttentionQueryGradientMma<Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((block.q_rows + Tile::kQueries - 1) / Tile::kQueries),
                  static_cast<unsigned>(block.heads), static_cast<unsigned>(block.batch));
  kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(block, gradients, tables);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
