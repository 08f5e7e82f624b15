#pragma once

// Backward of block attention on Hopper, over key tiles: products of warpgroups (wgmma.cuh) fed by the copy
// engine. A thread block has 128 keys of one KV head, 64 for each of two warpgroups, and walks over a share
// of the query tiles that see them, of all query heads of the group (attention_mma_backward_tables.cu):
//
//   S^T = K Q^T    P^T = exp(S^T - LSE)    dP^T = V dO^T    dS^T = P^T (dP^T - delta)
//   dV += P^T dO   dK += dS^T Q            dQ += dS K
//
// Compiled, and run in emulation (tests/emulation); not yet run on a GPU. Nothing dispatches to it.
//
// A warpgroup holds dK and dV of its keys in registers, and P^T, rounded, is the left operand of dV without
// leaving them. dS^T goes through shared memory: dQ sums over the keys of both warpgroups, each of which
// takes half of that product, and registers have no room to keep it for dK. The third warpgroup has few
// registers and no products: one warp brings tiles, two threads add dQ to device memory by the copy engine.
//
// A query tile is taken in steps of kStep queries, so that S^T and dP^T of a step fit the registers. Products
// are started well before they are waited for, so that the matrix unit has a queue; here with one step a
// tile:
//
//   tile n      in flight                    meanwhile
//   start dP    dK(n-1) dP(n)                exponentials of S(n)
//   start dV    dP(n) dV(n), dK(n-1) done    dS to shared memory once dP is done
//   barrier     dV(n)                        dS of both warpgroups is there
//   start dQ, S(n+1), dK
//               dQ(n) S(n+1) dK(n)           dQ to shared memory once it is done, S(n+1) is waited for
//
// With several steps S and dP of the next one are started when dS of one is done, and dQ and dK are products
// of the whole tile. With keys of 192, dK and dV take 160 of 240 registers, so that S(n+1) starts only when
// dQ has left them (kAhead).
//
// What orders the accesses to shared memory: each buffer has a barrier that says it is full and one that says
// it is empty, but for dS, whose barrier of both warpgroups is the one above.
//
//   Q, LSE, delta, ranges   loader, q_full; q_empty when dK is done
//   dO                      loader, dout_full; dout_empty when dV is done
//   dS                      warpgroups, their barrier; dscores_empty when dQ is done (dK reads own rows only)
//   sum of dQ               warpgroup, sum_full; sum_empty when the copy engine has read
//
// Floor: 2 (3 dim + 2 v_dim) FLOP per visible (query, key) pair and head. For each pair of tiles of 64 x 128
// with heads of 128: 10.5 MFLOP, 2,560 clocks of the matrix unit; through shared memory at 128 bytes a clock
// 2,180 for operands of products (S, dP and dQ 512 each, as much as they compute; dV 256, dK 384), 130 for
// dS, 500 for dQ in and out and 250 for Q and dO; 512 for exponentials; 32 KB added to and 32 KB read from
// L2. So shared memory is the tighter floor, and what dQ costs there the first thing to measure.

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

template <int kDim_, int kValueDim_, int kQueries_, int kStep_, MmaQueryGradient kQueryGradient_>
struct HopperBackwardTile {
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kStep = kStep_;
  static constexpr bool kOrdered = kQueryGradient_ == MmaQueryGradient::kOrdered;
  static constexpr int kQueries = kQueries_, kSteps = kQueries / kStep;
  static constexpr int kKeys = kBackwardKeys, kGroups = 2, kStages = 2;
  static constexpr int kThreads = (kGroups + 1) * 128, kMathWarps = kGroups * 4;
  static constexpr int kMathRegisters = 240, kLoadRegisters = 24;
  // What the block is started with is all there is to hand around: a request for more never returns.
  static_assert(128 * (kGroups * kMathRegisters + kLoadRegisters) <= kThreads * (65536 / kThreads / 8 * 8));
  static_assert(kKeys == 64 * kGroups && kQueries % kStep == 0 && kQueries % 64 == 0);
  // dQ of a query tile is shared out by rows where there are enough, by panels of 32 columns elsewhere.
  static constexpr bool kByRows = kDim == 64;
  static constexpr int kGradientColumns = HopperBackwardGradientColumns(kDim);

  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  using Q = SharedTile<kQueries, kDim>;
  using DOut = SharedTile<kQueries, kValueDim>;
  using DScores = SharedTile<kKeys, kQueries>;  // dS^T

  // Whether S of the next tile is started before dQ leaves the registers: with keys of 192 they do not hold
  // both.
  static constexpr bool kAhead = kDim <= 128;

  // What comes with a query tile besides the tile, of two rows each.
  struct Rows {
    float2 lse[kQueries / 2], delta[kQueries / 2];
    TwoKeyRows ranges[kQueries / 2];
  };
  // One query tile of the walk; row is negative past the end.
  struct At {
    int row, head;
    bool masked;
    int turn;  // key tiles before this one whose keys some query of the tile may see
  };
  static constexpr int kWay = 4;
  struct Small {
    Rows rows[kStages];
    At way[kWay];
    uint64_t keys, q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    uint64_t dscores_empty, sum_full[kGroups], sum_empty[kGroups];
  };

  // Shared memory, in bytes from its start.
  static constexpr int kV = K::kBytes, kQ = kV + V::kBytes, kDOut = kQ + kStages * Q::kBytes,
                       kDScores = kDOut + kStages * DOut::kBytes, kSum = kDScores + DScores::kBytes,
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
  __device__ uint32_t Sum(int group) const { return shared + Tile::kSum + group * Tile::kSumGroupBytes; }

  __device__ void InitBarriers() const {
    auto init = [](const uint64_t& barrier, int count) { PhaseBarrierInit(SharedAddress(&barrier), count); };
    init(small.keys, 1);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      init(small.q_full[stage], 2);  // the copy, and its rows
      init(small.dout_full[stage], 1);
      init(small.q_empty[stage], Tile::kMathWarps);
      init(small.dout_empty[stage], Tile::kMathWarps);
    }
    init(small.dscores_empty, Tile::kMathWarps);
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

// The warp that brings tiles.
template <typename Tile>
class BackwardLoader {
 public:
  __device__ explicit BackwardLoader(const HopperBackwardBlock<Tile>& block)
      : block_(block), lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ void Run(const QueryTileShare& share) {
    LoadKeys();
    const KeyTileWork& work = block_.work;
    const int group = block_.args.group;
    int head = share.head, tile = share.tile, left = share.left;
    const TileBounds* bounds =
        block_.args.tables.bounds + int64_t{block_.item} * block_.args.tables.query_tiles;
    while (left > 0) {
      const int count = min(min(work.last - tile, left), 32);
      bool touches = false, masks = false;
      int turn = 0;
      if (lane_ < count) {
        const TileBounds bound = bounds[tile + lane_];
        touches = bound.Touches(block_.key, block_.key + Tile::kKeys);
        masks = bound.Masks(block_.key, block_.key + Tile::kKeys);
        turn = block_.key / Tile::kKeys - bound.begin / Tile::kKeys;
      }
      const unsigned masked = __ballot_sync(~0u, masks);
      for (unsigned todo = __ballot_sync(~0u, touches); todo != 0; todo &= todo - 1) {
        const int i = __ffs(static_cast<int>(todo)) - 1;
        Load({(tile + i) * Tile::kQueries, block_.kv_head * group + head, (masked >> i & 1) != 0,
              __shfl_sync(~0u, turn, i)});
      }
      left -= count;
      tile += count;
      if (tile == work.last) tile = work.first, ++head;
    }
    End();
  }

 private:
  __device__ void LoadKeys() const {
    if (lane_ != 0) return;
    const HopperBackwardArgs& args = block_.args;
    const uint32_t full = SharedAddress(&block_.small.keys);
    PhaseBarrierExpect(full, Tile::K::kBytes + Tile::V::kBytes);
    LoadTile(block_.shared, args.k, full, block_.key, block_.kv_head * (Tile::kDim / 64), block_.item);
    LoadTile(block_.shared + Tile::kV, args.v, full, block_.key, block_.kv_head * (Tile::kValueDim / 64),
             block_.item);
  }

  __device__ void Load(const typename Tile::At& at) {
    auto& small = block_.small;
    const HopperBackwardArgs& args = block_.args;
    const int stage = round_ % Tile::kStages, phase = round_ / Tile::kStages;
    const uint32_t q_full = SharedAddress(&small.q_full[stage]);
    WaitAt(small.q_empty[stage], phase + 1);
    if (lane_ == 0) {
      PhaseBarrierExpect(q_full, Tile::Q::kBytes);
      LoadTile(block_.Q(stage), args.q, q_full, at.row, at.head * (Tile::kDim / 64), block_.item);
    }
    LoadRows(at.row, at.head, &small.rows[stage]);
    if (lane_ == 0) small.way[round_ % Tile::kWay] = at;
    WarpArrive(small.q_full[stage]);
    WaitAt(small.dout_empty[stage], phase + 1);
    if (lane_ == 0) {
      const uint32_t dout_full = SharedAddress(&small.dout_full[stage]);
      PhaseBarrierExpect(dout_full, Tile::DOut::kBytes);
      LoadTile(block_.DOut(stage), args.dout, dout_full, at.row, at.head * (Tile::kValueDim / 64),
               block_.item);
    }
    ++round_;
  }

  __device__ void LoadRows(int row, int head, typename Tile::Rows* to) const {
    const BackwardTables& tables = block_.args.tables;
    const RowStats* stats =
        tables.stats + (int64_t{block_.item} * block_.args.heads + head) * tables.padded_rows + row;
    const KeyRows* ranges = tables.ranges + block_.item * tables.padded_rows + row;
    constexpr int kTwos = Tile::kQueries / 64;  // of rows, for each lane
    TwoRowStats stat[kTwos];
    TwoKeyRows range[kTwos];
#pragma unroll
    for (int i = 0; i < kTwos; ++i) {
      stat[i] = reinterpret_cast<const TwoRowStats*>(stats)[lane_ + i * 32];
      range[i] = reinterpret_cast<const TwoKeyRows*>(ranges)[lane_ + i * 32];
    }
#pragma unroll
    for (int i = 0; i < kTwos; ++i) {
      const int at = lane_ + i * 32;
      to->lse[at] = {stat[i].rows[0].lse, stat[i].rows[1].lse};
      to->delta[at] = {stat[i].rows[0].delta, stat[i].rows[1].delta};
      to->ranges[at] = range[i];
    }
  }

  __device__ void End() {
    auto& small = block_.small;
    const int stage = round_ % Tile::kStages;
    WaitAt(small.q_empty[stage], round_ / Tile::kStages + 1);
    if (lane_ == 0) {
      small.way[round_ % Tile::kWay] = {-1, 0, false, 0};
      PhaseBarrierArrive(SharedAddress(&small.q_full[stage]));
      PhaseBarrierArrive(SharedAddress(&small.q_full[stage]));
    }
  }

  const HopperBackwardBlock<Tile>& block_;
  const int lane_;
  int round_ = 0;
};

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

// A warpgroup with 64 keys.
template <typename Tile>
class BackwardKeyGroup {
 public:
  __device__ BackwardKeyGroup(const HopperBackwardBlock<Tile>& block, int group)
      : block_(block),
        group_(group),
        lane_(static_cast<int>(threadIdx.x % 32)),
        row_(group * 64 + static_cast<int>(threadIdx.x / 32 % 4) * 16) {
    Clear(dk_);
    Clear(dv_);
  }

  __device__ void Walk() {
    auto& small = block_.small;
    WaitAt(small.keys, 0);
    ClearUnseenKeys();
    WaitAt(small.q_full[0], 0);
    // In registers before the first product is in flight.
    GroupUse(dk_[0]);
    GroupUse(dv_[0]);
    StartScores(0, 0);
    GroupWait<0>();
    GroupUse(scores_);
    int round = 0;
    for (; small.way[round % Tile::kWay].row >= 0; ++round) {
      WaitAt(small.dout_full[round % Tile::kStages], round / Tile::kStages);
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) Step(round, step);
    }
    GroupWait<0>();
    // The end of the walk, in a phase of its own: not that of the last tile, which other warps may still owe.
    WaitAt(small.sum_empty[group_], round + 1);
    WarpArrive(small.sum_full[group_]);
  }

  __device__ void Store(const GradientRows& dk, const GradientRows& dv) {
    GroupUse(dk_[0]);
    GroupUse(dv_[0]);
    WriteRows(dv_, kUnscaleWeight, row_, dv);
    WriteRows(dk_, block_.args.scale * kUnscaleWeight, row_, dk);
  }

 private:
  static constexpr int kStep = Tile::kStep, kN = kStep / 8;
  static constexpr Major kIn = Major::kDepthInRow, kAcross = Major::kDepthAcrossRows;

  // Keys no query sees may hold anything, and meet weights of zero.
  __device__ void ClearUnseenKeys() const {
    const KeyTileWork& work = block_.work;
    if (work.begin > 0 || work.end < Tile::kKeys) {
      for (int row = static_cast<int>(threadIdx.x) / 8; row < Tile::kKeys; row += Tile::kGroups * 16) {
        if (row >= work.begin && row < work.end) continue;
        const int chunk = static_cast<int>(threadIdx.x % 8);
        for (int panel = 0; panel < Tile::kDim / 64; ++panel) {
          ClearShared16(block_.shared + Tile::K::Offset(row, panel * 8 + chunk));
        }
        for (int panel = 0; panel < Tile::kValueDim / 64; ++panel) {
          ClearShared16(block_.shared + Tile::kV + Tile::V::Offset(row, panel * 8 + chunk));
        }
      }
      BulkFence();
    }
    BarrierOfRoles(kMathBarrier, Tile::kGroups * 128);
  }

  __device__ __forceinline__ void StartScores(int stage, int step) {
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      MultiplyShared<kIn, kIn>(scores_, OperandAt<Tile::kKeys>(block_.shared, 0, 2 * d) + GroupRows(),
                               OperandAt<Tile::kQueries>(block_.Q(stage), step * kStep, 2 * d), d > 0);
    }
    GroupCommit();
  }
  __device__ __forceinline__ void StartWeightGradients(int stage, int step) {
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kValueDim / 16; ++d) {
      MultiplyShared<kIn, kIn>(dscores_,
                               OperandAt<Tile::kKeys>(block_.shared + Tile::kV, 0, 2 * d) + GroupRows(),
                               OperandAt<Tile::kQueries>(block_.DOut(stage), step * kStep, 2 * d), d > 0);
    }
    GroupCommit();
  }
  // The warpgroup's first row in a descriptor.
  __device__ uint64_t GroupRows() const { return static_cast<uint64_t>(group_ * 64 * 128 / 16); }

  // dV += P^T dO of the step.
  __device__ __forceinline__ void StartValueGradients(int stage, int step) {
    uint32_t weights[kStep / 16][4];
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) PackFragment(weights[k], scores_[2 * k], scores_[2 * k + 1]);
    GroupUse(dv_[0]);
    GroupFence();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      MultiplyRegisters<kAcross>(dv_[0], weights[k],
                                 OperandAt<Tile::kQueries>(block_.DOut(stage), step * kStep + 16 * k, 0), 1);
    }
    GroupCommit();
  }

  // dK += dS^T Q of the tile, dS^T from shared memory: in registers there is no room for it.
  __device__ __forceinline__ void StartKeyGradients(int stage) {
    const uint32_t dscores = block_.shared + Tile::kDScores;
    GroupUse(dk_[0]);
    GroupFence();
#pragma unroll
    for (int k = 0; k < Tile::kQueries / 16; ++k) {
      MultiplyShared<kIn, kAcross>(dk_[0], OperandAt<Tile::kKeys>(dscores, 0, 2 * k) + GroupRows(),
                                   OperandAt<Tile::kQueries>(block_.Q(stage), 16 * k, 0), 1);
    }
    GroupCommit();
  }

  // One step, from S, and where it is not the first dP in flight, to those of the next one.
  __device__ __forceinline__ void Step(int round, int step) {
    auto& small = block_.small;
    const int stage = round % Tile::kStages;
    const auto& rows = small.rows[stage];
    if (step == 0) StartWeightGradients(stage, 0);
    if (small.way[round % Tile::kWay].masked) {
      Weigh<true>(rows, step);
    } else {
      Weigh<false>(rows, step);
    }
    StartValueGradients(stage, step);
    GroupWait<1>();  // dK of the tile before, dP
    GroupUse(dscores_);
    if (step == 0) {
      if (round > 0) WarpArrive(small.q_empty[stage ^ 1]);
      WaitAt(small.dscores_empty, round + 1);
    }
    Differentiate(rows, step);
    if (step < Tile::kSteps - 1) {
      StartScores(stage, step + 1);
      StartWeightGradients(stage, step + 1);
      GroupWait<1>();
      GroupUse(scores_);
    } else {
      FinishTile(round);
    }
  }

  // From dS of all steps to S of the next tile, whose Q is waited for.
  __device__ __forceinline__ void FinishTile(int round) {
    auto& small = block_.small;
    const int stage = round % Tile::kStages, next = (round + 1) % Tile::kStages;
    BulkFence();
    BarrierOfRoles(kMathBarrier, Tile::kGroups * 128);
    float dq[8][4], dq_rest[4][4];
    if constexpr (Tile::kAhead) {
      StartQueryGradients(dq, dq_rest);
      WaitAt(small.q_full[next], (round + 1) / Tile::kStages);
      StartScores(next, 0);  // past the end of no consequence
      StartKeyGradients(stage);
      GroupWait<2>();
      WarpArrive(small.dout_empty[stage]);
      AddQueryGradients(dq, dq_rest, round);
      GroupWait<1>();  // dK stays in flight
    } else {
      GroupWait<0>();
      GroupUse(dv_[0]);
      WarpArrive(small.dout_empty[stage]);
      StartQueryGradients(dq, dq_rest);
      StartKeyGradients(stage);
      GroupWait<1>();
      AddQueryGradients(dq, dq_rest, round);
      WaitAt(small.q_full[next], (round + 1) / Tile::kStages);
      StartScores(next, 0);
      GroupWait<0>();
    }
    GroupUse(scores_);
  }

  template <bool kMasked>
  __device__ __forceinline__ void Weigh(const typename Tile::Rows& rows, int step) {
    const float scale = block_.args.scale * kLog2E;
    const int key = block_.key + row_ + lane_ / 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = step * kStep + n * 8 + lane_ % 4 * 2;
      const float2 lse = rows.lse[column / 2];
      TwoKeyRows allowed;
      if (kMasked) allowed = rows.ranges[column / 2];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float weight = Exp2(fmaf(scores_[n][c], scale, c % 2 ? -lse.y : -lse.x));
        if (kMasked) {
          const int row = key + c / 2 * 8;
          if (row < allowed.rows[c % 2].begin || row >= allowed.rows[c % 2].end) weight = 0;
        }
        scores_[n][c] = weight;
      }
    }
  }

  // dS^T of the step, rounded, also to shared memory.
  __device__ __forceinline__ void Differentiate(const typename Tile::Rows& rows, int step) {
    const uint32_t to = block_.shared + Tile::kDScores + Tile::DScores::LaneOffset(lane_, row_);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
      for (int n = 2 * k; n < 2 * k + 2; ++n) {
        const int column = step * kStep + n * 8 + lane_ % 4 * 2;
        const float2 delta = rows.delta[column / 2];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          dscores_[n][c] = scores_[n][c] * (dscores_[n][c] - (c % 2 ? delta.y : delta.x));
        }
      }
      uint32_t dscores[4];
      PackFragment(dscores, dscores_[2 * k], dscores_[2 * k + 1]);
      StoreMatrices(Tile::DScores::At(to, 0, step * (kStep / 16) + k), dscores);
    }
  }

  // The warpgroup's part of dS K: 64 query rows and a panel of K; of three panels each warpgroup has one and
  // half of the middle one, of which a product takes 32 columns.
  __device__ __forceinline__ void StartQueryGradients(float (&dq)[8][4], float (&rest)[4][4]) {
    const uint32_t dscores = block_.shared + Tile::kDScores +
                             static_cast<uint32_t>(Tile::kByRows ? group_ * Tile::DScores::kPanelBytes : 0);
    const uint32_t k =
        block_.shared +
        static_cast<uint32_t>(Tile::kByRows ? 0 : group_ * (Tile::kDim / 64 - 1) * Tile::K::kPanelBytes);
    const uint32_t middle = block_.shared + static_cast<uint32_t>(Tile::K::kPanelBytes + group_ * 64);
    GroupFence();
#pragma unroll
    for (int key = 0; key < Tile::kKeys; key += 16) {
      const uint64_t left = OperandAt<Tile::kKeys>(dscores, key, 0);
      MultiplyShared<kAcross, kAcross>(dq, left, OperandAt<Tile::kKeys>(k, key, 0), key > 0);
      if constexpr (kRest) {
        MultiplyShared<kAcross, kAcross>(rest, left, OperandAt<Tile::kKeys>(middle, key, 0), key > 0);
      }
    }
    GroupCommit();
  }

  __device__ __forceinline__ void AddQueryGradients(float (&dq)[8][4], float (&rest)[4][4], int round) {
    auto& small = block_.small;
    GroupUse(dq);
    if constexpr (kRest) GroupUse(rest);
    WarpArrive(small.dscores_empty);
    WaitAt(small.sum_empty[group_], round + 1);
    StoreQueryGradients(dq, kRest ? group_ * 32 : 0);
    if constexpr (kRest) StoreQueryGradients(rest, (1 - group_) * 64);
    BulkFence();
    WarpArrive(small.sum_full[group_]);
  }

  // Columns `first` ... of the warpgroup's part of dQ, which is panels of 32 columns and 64 rows, 16-byte
  // chunk c of row r at place c ^ (r % 8). Lanes of odd rows store in another order than those of even rows,
  // so that half a warp falls on distinct banks.
  template <int kCount>
  __device__ __forceinline__ void StoreQueryGradients(const float (&dq)[kCount][4], int first) {
    const float scale = block_.args.scale * kUnscaleWeight;
    const int row = row_ % 64 + lane_ / 4;
    const bool odd = row % 2 == 1;
    const uint32_t to =
        block_.Sum(group_) +
        static_cast<uint32_t>(first * 64 * 4 + row * 128 +
                              ((lane_ % 4 / 2) ^ (row % 8) ^ (odd ? 4 : 0)) * 16 + lane_ % 2 * 8);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const uint32_t at = (to ^ static_cast<uint32_t>(n % 4 * 32)) + static_cast<uint32_t>(n / 4 * 64 * 128);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = odd ? dq[n ^ 2][2 * half] : dq[n][2 * half],
                    y = odd ? dq[n ^ 2][2 * half + 1] : dq[n][2 * half + 1];
        StoreShared(at + static_cast<uint32_t>(half * 8 * 128), scale * x, scale * y);
      }
    }
  }

  static constexpr bool kRest = Tile::kGradientColumns > 64;
  static constexpr int kMathBarrier = 1;

  const HopperBackwardBlock<Tile>& block_;
  const int group_, lane_;
  const int row_;  // of the warp's first key
  float scores_[kN][4], dscores_[kN][4];
  Fragments<1, Tile::kDim> dk_;
  Fragments<1, Tile::kValueDim> dv_;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    AttentionBackwardHopper(const __grid_constant__ HopperBackwardArgs args) {
  if constexpr (kHopper) {
    WaitForPredecessor();
    unsigned char* const shared = DynamicShared();
    const BackwardTables& tables = args.tables;
    const BackwardShare share = tables.shares[blockIdx.x];
    if (share.key_tile < 0) return;
    const KeyTileWork work = tables.work[share.key_tile];
    const HopperBackwardBlock<Tile> block{args,
                                          SharedAddress(shared),
                                          *reinterpret_cast<typename Tile::Small*>(shared + Tile::kSmall),
                                          share.key_tile / tables.key_tiles,
                                          share.key_tile % tables.key_tiles * Tile::kKeys,
                                          share.kv_head,
                                          work};
    const QueryTileShare walk(work, args.group, share.number);  // divisions need registers
    if (threadIdx.x == 0) block.InitBarriers();
    __syncthreads();
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);  // known to be the warp's
    if (group == Tile::kGroups) {
      ShrinkRegisters<Tile::kLoadRegisters>();
      const int warp = static_cast<int>(threadIdx.x / 32 % 4);
      if (warp == 0) BackwardLoader<Tile>(block).Run(walk);
      if (warp > 0 && warp <= Tile::kGroups && ElectLane()) AddQueryGradients(block, warp - 1);
    } else {
      GrowRegisters<Tile::kMathRegisters>();
      BackwardKeyGroup<Tile> keys(block, group);
      keys.Walk();
      keys.Store(RowsOf<Tile, Tile::kDim>(block, args.dk, 0),
                 RowsOf<Tile, Tile::kValueDim>(block, args.dv, Tile::kDim));
    }
  }
}

template <typename Tile>
cudaError_t LaunchHopperBackwardTile(const HopperBackwardArgs& args, cudaStream_t stream) {
  const auto kernel = AttentionBackwardHopper<Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  return LaunchEarly(kernel, dim3(static_cast<unsigned>(args.tables.most_shares)), Tile::kThreads,
                     Tile::kSharedBytes, stream, args);
}

template <int kDim, int kValueDim, int kStep, int kQueries = HopperBackwardQueries(kDim)>
cudaError_t LaunchHopperBackward(const HopperBackwardArgs& args, MmaQueryGradient query_gradient,
                                 cudaStream_t stream) {
  if (query_gradient == MmaQueryGradient::kAtomic) {
    return LaunchHopperBackwardTile<
        HopperBackwardTile<kDim, kValueDim, kQueries, kStep, MmaQueryGradient::kAtomic>>(args, stream);
  }
  return LaunchHopperBackwardTile<
      HopperBackwardTile<kDim, kValueDim, kQueries, kStep, MmaQueryGradient::kOrdered>>(args, stream);
}

}  // namespace annulus::kernels
