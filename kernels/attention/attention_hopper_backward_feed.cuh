#pragma once

// What a thread block of the backward on Hopper (attention_hopper_backward.cuh) shares, and the warpgroup
// without products: one warp brings tiles, one what belongs to their rows, and two threads add dQ to device
// memory.

#include "attention_hopper_backward.h"
#include "attention_mma_products.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/hopper_add.cuh"

namespace annulus::kernels {

struct alignas(16) TwoKeyRows {
  KeyRows rows[2];
};
struct alignas(16) TwoRowStats {
  RowStats rows[2];
};

template <int kDim_, int kValueDim_, int kQueries_, int kSteps_, MmaQueryGradient kQueryGradient_>
struct HopperBackwardTile {
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kQueries = kQueries_, kSteps = kSteps_;
  static constexpr bool kOrdered = kQueryGradient_ == MmaQueryGradient::kOrdered;
  static constexpr int kKeys = kBackwardKeys, kGroups = 2;
  static constexpr int kThreads = (kGroups + 1) * 128, kMathWarps = kGroups * 4;
  static constexpr int kMathRegisters = 240, kLoadRegisters = 24;
  // What the block is started with is all there is to hand around: a request for more never returns.
  static_assert(128 * (kGroups * kMathRegisters + kLoadRegisters) <= kThreads * (65536 / kThreads / 8 * 8));
  static_assert(kKeys == 64 * kGroups && kQueries % 64 == 0 && kQueries % (kSteps * 16) == 0);
  // dQ of a query tile is shared out by rows where there are enough, by columns elsewhere.
  static constexpr bool kByRows = kDim == 64;
  static constexpr int kGradientColumns = HopperBackwardGradientColumns(kDim);
  // With keys of 192, dK and dV take 160 of 240 registers: dS^T comes from shared memory for dK too, S of the
  // next tile is started when dQ has left the registers, and rows' statistics are read where they are used.
  static constexpr bool kRoomy = kDim <= 128;

  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  using Q = SharedTile<kQueries, kDim>;
  using DOut = SharedTile<kQueries, kValueDim>;
  using DScores = SharedTile<kKeys, kQueries>;  // dS^T
  static constexpr int kQStages = kDim == 64 ? 3 : 2, kDOutStages = kRoomy ? 2 : 1, kDScoresStages = 2;

  // Where panels of 64 columns of K lie. Of three the middle one comes last, so that the columns of dQ of
  // either warpgroup, an outer panel and half of the middle one, are in order and at one distance.
  __host__ __device__ static constexpr int PlaceOfPanel(int panel) {
    return kDim == 192 ? (3 - panel) % 3 : panel;
  }

  // What comes with a query tile besides the tile, of two rows each.
  struct Rows {
    float2 lse[kQueries / 2];
    float2 delta[kQueries / 2];       // -scale 2^-15 delta: weights are 2^15 too large, dS is not
    TwoKeyRows ranges[kQueries / 2];  // of masked tiles only
  };
  // One query tile of the walk; row is negative past the end.
  struct At {
    int row, head;
    bool masked;
    int turn;  // key tiles before this one whose keys some query of the tile may see
  };
  static constexpr int kWay = 8;  // dQ of a tile is added up to five tiles behind the one that is brought
  struct Small {
    Rows rows[kQStages];
    At way[kWay];
    uint64_t keys, q_full[kQStages], rows_full[kQStages], q_empty[kQStages];
    uint64_t dout_full[kDOutStages], dout_empty[kDOutStages];
    uint64_t dscores_full[kDScoresStages], dscores_empty[kDScoresStages];
    uint64_t sum_full[kGroups], sum_empty[kGroups];
  };

  // Shared memory, in bytes from its start.
  static constexpr int kV = K::kBytes, kQ = kV + V::kBytes, kDOut = kQ + kQStages * Q::kBytes,
                       kDScores = kDOut + kDOutStages * DOut::kBytes,
                       kSum = kDScores + kDScoresStages * DScores::kBytes,
                       kSumGroupBytes = 64 * kGradientColumns * 4, kSmall = kSum + kGroups * kSumGroupBytes,
                       kSharedBytes = kSmall + static_cast<int>(sizeof(Small));
  static_assert(kSharedBytes <= 227 * 1024);
};

// A thread block and what its warps share.
template <typename Tile>
struct HopperBackwardBlock {
  const HopperBackwardArgs& args;
  uint32_t shared;
  typename Tile::Small& small;
  int item, key, kv_head;
  KeyTileWork work;

  __device__ uint32_t Q(int stage) const { return shared + Tile::kQ + stage * Tile::Q::kBytes; }
  __device__ uint32_t DOut(int stage) const { return shared + Tile::kDOut + stage * Tile::DOut::kBytes; }
  __device__ uint32_t DScores(int stage) const {
    return shared + Tile::kDScores + stage * Tile::DScores::kBytes;
  }
  __device__ uint32_t Sum(int group) const { return shared + Tile::kSum + group * Tile::kSumGroupBytes; }

  __device__ void InitBarriers() const {
    auto init = [](const uint64_t& barrier, int count) { PhaseBarrierInit(SharedAddress(&barrier), count); };
    init(small.keys, 1);
    for (int stage = 0; stage < Tile::kQStages; ++stage) {
      init(small.q_full[stage], 1);
      init(small.rows_full[stage], 32);
      init(small.q_empty[stage], Tile::kMathWarps);
    }
    for (int stage = 0; stage < Tile::kDOutStages; ++stage) {
      init(small.dout_full[stage], 1);
      init(small.dout_empty[stage], Tile::kMathWarps);
    }
    for (int stage = 0; stage < Tile::kDScoresStages; ++stage) {
      init(small.dscores_full[stage], Tile::kMathWarps);
      init(small.dscores_empty[stage], Tile::kMathWarps);
    }
    for (int group = 0; group < Tile::kGroups; ++group) {
      init(small.sum_full[group], 4);
      init(small.sum_empty[group], 1);
    }
    PhaseBarrierFence();
  }
};

// The rows of dk or dv, kColumns wide, whose sums of shares begin at `column`; keys no query sees are not
// touched.
template <typename Tile, int kColumns>
__device__ GradientRows RowsOf(const HopperBackwardBlock<Tile>& block, const CudaHeads<float>& x,
                               int column) {
  const BackwardTables& tables = block.args.tables;
  const KeyTileWork& work = block.work;
  if (Tile::kOrdered && work.shares > 1) {
    constexpr int kWidth = Tile::kDim + Tile::kValueDim;
    const int64_t slot = int64_t{block.kv_head} * tables.slots + work.slot + tables.shares[blockIdx.x].number;
    return {tables.sums + slot * Tile::kKeys * kWidth + column, kWidth, work.begin, work.end, RowWrite::kSet};
  }
  return {x.data + block.key * x.row_stride + block.item * x.batch_stride + int64_t{block.kv_head} * kColumns,
          x.row_stride, work.begin, work.end, Tile::kOrdered ? RowWrite::kAdd : RowWrite::kAtomicAdd};
}

__device__ inline void WaitAt(const uint64_t& barrier, int phase) {
  PhaseBarrierWait(SharedAddress(&barrier), phase & 1);
}
// By one lane for its warp, what all lanes did before included.
__device__ inline void WarpArrive(const uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) PhaseBarrierArrive(SharedAddress(&barrier));
}

// Where a thread block's walk over the (head, query tile) pairs of its keys begins: at a tile of a head of
// the group, `left` pairs on.
struct QueryTileShare {
  int head, tile, left;

  __device__ QueryTileShare(const KeyTileWork& work, int group, int number) {
    const int tiles = work.last - work.first;
    const int64_t all = int64_t{group} * tiles, begin = all * number / work.shares;
    head = static_cast<int>(begin / tiles);
    tile = work.first + static_cast<int>(begin % tiles);
    left = static_cast<int>(all * (number + 1) / work.shares - begin);
  }
};

// Calls visit(At) with each query tile of the walk, by a warp.
template <typename Tile, typename Visit>
__device__ void ForEachQueryTile(const HopperBackwardBlock<Tile>& block, const QueryTileShare& share,
                                 Visit&& visit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const KeyTileWork& work = block.work;
  const int group = block.args.group;
  int head = block.kv_head * group + share.head, tile = share.tile, left = share.left;
  const TileBounds* bounds = block.args.tables.bounds + int64_t{block.item} * block.args.tables.query_tiles;
  while (left > 0) {
    const int count = min(min(work.last - tile, left), 32);
    bool touches = false, masks = false;
    int turn = 0;
    if (lane < count) {
      const TileBounds bound = bounds[tile + lane];
      touches = bound.Touches(block.key, block.key + Tile::kKeys);
      masks = bound.Masks(block.key, block.key + Tile::kKeys);
      turn = block.key / Tile::kKeys - bound.begin / Tile::kKeys;
    }
    const unsigned masked = __ballot_sync(~0u, masks);
    for (unsigned todo = __ballot_sync(~0u, touches); todo != 0; todo &= todo - 1) {
      const int i = __ffs(static_cast<int>(todo)) - 1;
      visit(typename Tile::At{(tile + i) * Tile::kQueries, head, (masked >> i & 1) != 0,
                              Tile::kOrdered ? __shfl_sync(~0u, turn, i) : 0});
    }
    left -= count;
    tile += count;
    if (tile == work.last) tile = work.first, ++head;
  }
}

// The warp that brings tiles.
template <typename Tile>
__device__ void LoadTiles(const HopperBackwardBlock<Tile>& block, const QueryTileShare& share) {
  auto& small = block.small;
  const HopperBackwardArgs& args = block.args;
  const bool leads = threadIdx.x % 32 == 0;
  if (leads) {
    const uint32_t full = SharedAddress(&small.keys);
    PhaseBarrierExpect(full, Tile::K::kBytes + Tile::V::kBytes);
    for (int panel = 0; panel < Tile::kDim / 64; ++panel) {
      LoadTile(block.shared + static_cast<uint32_t>(Tile::PlaceOfPanel(panel) * Tile::K::kPanelBytes), args.k,
               full, block.key, block.kv_head * (Tile::kDim / 64) + panel, block.item);
    }
    LoadTile(block.shared + Tile::kV, args.v, full, block.key, block.kv_head * (Tile::kValueDim / 64),
             block.item);
  }
  int round = 0;
  ForEachQueryTile(block, share, [&](const typename Tile::At& at) {
    const int q = round % Tile::kQStages, dout = round % Tile::kDOutStages;
    WaitAt(small.q_empty[q], round / Tile::kQStages + 1);
    if (leads) {
      const uint32_t full = SharedAddress(&small.q_full[q]);
      PhaseBarrierExpect(full, Tile::Q::kBytes);
      LoadTile(block.Q(q), args.q, full, at.row, at.head * (Tile::kDim / 64), block.item);
    }
    WaitAt(small.dout_empty[dout], round / Tile::kDOutStages + 1);
    if (leads) {
      const uint32_t full = SharedAddress(&small.dout_full[dout]);
      PhaseBarrierExpect(full, Tile::DOut::kBytes);
      LoadTile(block.DOut(dout), args.dout, full, at.row, at.head * (Tile::kValueDim / 64), block.item);
    }
    ++round;
  });
  const int end = round % Tile::kQStages;
  WaitAt(small.q_empty[end], round / Tile::kQStages + 1);
  if (leads) PhaseBarrierArrive(SharedAddress(&small.q_full[end]));
}

// The warp that brings what belongs to their rows, and says which tiles they are. Each lane arrives for what
// it has written: race checkers do not follow one that arrives for its warp.
template <typename Tile>
__device__ void LoadRows(const HopperBackwardBlock<Tile>& block, const QueryTileShare& share) {
  auto& small = block.small;
  const BackwardTables& tables = block.args.tables;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float factor = block.args.scale * kUnscaleWeight;
  int round = 0;
  ForEachQueryTile(block, share, [&](const typename Tile::At& at) {
    const int stage = round % Tile::kQStages;
    auto& to = small.rows[stage];
    const RowStats* stats =
        tables.stats + (int64_t{block.item} * block.args.heads + at.head) * tables.padded_rows + at.row;
    const KeyRows* ranges = tables.ranges + block.item * tables.padded_rows + at.row;
    WaitAt(small.q_empty[stage], round / Tile::kQStages + 1);
#pragma unroll
    for (int i = lane; i < Tile::kQueries / 2; i += 32) {
      const TwoRowStats stat = reinterpret_cast<const TwoRowStats*>(stats)[i];
      if (at.masked) to.ranges[i] = reinterpret_cast<const TwoKeyRows*>(ranges)[i];
      to.lse[i] = float2{stat.rows[0].lse, stat.rows[1].lse};
      to.delta[i] = float2{-factor * stat.rows[0].delta, -factor * stat.rows[1].delta};
    }
    if (lane == 0) small.way[round % Tile::kWay] = at;
    PhaseBarrierArrive(SharedAddress(&small.rows_full[stage]));
    ++round;
  });
  const int end = round % Tile::kQStages;
  WaitAt(small.q_empty[end], round / Tile::kQStages + 1);
  if (lane == 0) small.way[round % Tile::kWay] = {-1, 0, false, 0};
  PhaseBarrierArrive(SharedAddress(&small.rows_full[end]));
}

// Sums of dQ in a fixed order: a query tile is added to in order of the keys, each thread block in its turn.
// Blocks are started in order of their keys, so that the one whose turn it is runs.
template <typename Tile>
__device__ int* TurnOf(const HopperBackwardBlock<Tile>& block, const typename Tile::At& at, int group) {
  const HopperBackwardArgs& args = block.args;
  const int64_t of_group = int64_t{args.batch} * args.heads * args.tables.query_tiles;
  return args.tables.turns + group * of_group +
         (int64_t{block.item} * args.heads + at.head) * args.tables.query_tiles + at.row / Tile::kQueries;
}
__device__ inline void WaitForTurn(const int* turn, int number) {
  constexpr int kMostTries = 1 << 28;  // minutes
  for (int tries = 0; LoadAcquire(turn) != number; ++tries) {
    if (tries == kMostTries) __trap();
    __nanosleep(40);
  }
  BulkFenceGlobal();
}
// The thread's sums are complete.
__device__ inline void EndTurn(int* turn, int number) {
  BulkFenceGlobal();
  StoreRelease(turn, number + 1);
}

// One thread that adds a warpgroup's parts of dQ to global memory.
template <typename Tile>
__device__ void AddQueryGradients(const HopperBackwardBlock<Tile>& block, int group) {
  auto& small = block.small;
  for (int round = 0;; ++round) {
    WaitAt(small.sum_full[group], round);
    const typename Tile::At at = small.way[round % Tile::kWay];
    if (at.row < 0) break;
    const int row = at.row + (Tile::kByRows ? group * 64 : 0);
    const int panel = at.head * (Tile::kDim / 32) + (Tile::kByRows ? 0 : group * Tile::kGradientColumns / 32);
    int* turn = Tile::kOrdered ? TurnOf(block, at, group) : nullptr;
    if (Tile::kOrdered) WaitForTurn(turn, at.turn);
    AddTile(block.args.dq, block.Sum(group), row, panel, block.item);
    BulkCommit();
    BulkWaitRead();
    PhaseBarrierArrive(SharedAddress(&small.sum_empty[group]));
    if (Tile::kOrdered) {
      BulkWait();
      EndTurn(turn, at.turn);
    }
  }
  BulkWait();
}

}  // namespace annulus::kernels
