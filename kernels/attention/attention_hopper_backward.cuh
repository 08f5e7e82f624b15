#pragma once

// Backward of block attention on Hopper, over key tiles: products of warpgroups (wgmma.cuh) fed by the copy
// engine. A thread block has 128 keys of one KV head, 64 for each of two warpgroups, and walks over a share
// of the query tiles that see them, of all query heads of the group (attention_mma_backward_tables.cu):
//
//   S^T = K Q^T    P^T = exp(S^T - LSE)    dP^T = V dO^T    dS^T = scale P^T (dP^T - delta)
//   dV += P^T dO   dK += dS^T Q            dQ += dS K
//
// A warpgroup holds dK and dV of its keys in registers, and P^T and dS^T, rounded, are the left operands of
// their products without leaving them. dQ sums over the keys of both warpgroups: dS^T goes through shared
// memory, and each takes half of that product, one tile late. So neither waits for the other, and they run
// half a tile apart: one has products while the other has exponentials. The third warpgroup has few registers
// and no products (attention_hopper_backward_feed.cuh).
//
// One tile of a warpgroup; products run in the order in which they are started:
//
//   start             meanwhile                                                   until
//   dP(n)             exponentials of S(n)                                        dP(n)
//                     dS(n), also to shared memory
//   dV(n) dK(n)       dS(n) is announced, dS(n-1) of both warpgroups is there     dV(n)
//   dQ(n-1) S(n+1)                                                                dK(n) dQ(n-1)
//                     dQ(n-1) to shared memory, what belongs to rows of n+1       S(n+1)
//
// With keys of 192, dK and dV take 160 of 240 registers. Then dP is a product of half the queries at a time,
// dK has dS^T from shared memory, and S(n+1) is started when dQ has left the registers.
//
// What orders the accesses to shared memory: each buffer has a barrier that says it is full and one that says
// it is empty.
//
//   Q                       loader, q_full; q_empty when dK is done
//   LSE, delta, ranges      loader of rows, rows_full; q_empty
//   dO                      loader, dout_full; dout_empty when dV is done
//   dS                      warpgroups, dscores_full; dscores_empty when dQ is done (dK reads own rows only)
//   sum of dQ               warpgroup, sum_full; sum_empty when the copy engine has read
//
// Floor: 2 (3 dim + 2 v_dim) FLOP per visible (query, key) pair and head. For each pair of tiles of 64 x 128
// with heads of 128: 10.5 MFLOP, 2,560 clocks of the matrix unit. Shared memory at 128 bytes a clock:
//
//   operands   S, dP, dQ 512 clocks each, as much as they compute: 64 x 64 x 16 is 2 KB of either operand and
//              32 clocks; dV, dK 256 each, half of that, with the left operand in registers
//   results    dS 128, dQ 256 in and 256 out
//   rest       Q and dO 256, statistics of rows 144
//
// are 3,090 clocks, the tighter floor; the exponentials 512; 32 KB added to and 32 KB read from L2.
//
// On an H200 (8K rows, causal, 16 heads, profiled) such a pair takes 3,800 clocks, the starts of blocks
// included: the matrix unit works in 68% of all clocks, L1 and shared memory in 78%. Of a warp's time in its
// loop go
//
//   23%   into the start of dP and exponentials       22%   into the start of dQ and S of the next tile
//   13%   into waits for dP and statistics of rows    18%   into dQ to shared memory, and its fence
//   12%   into dS, its fence and the wait for dV       7%   into the start of dV and dK
//
// where starts are mostly waits for the matrix unit's queue. Without dQ's way through shared memory the
// kernel ran 9% faster, without exponentials 7%. On 32K rows the 700 W of the board are a limit too: the
// clock falls from 1.98 to about 1.65 GHz.

#include "attention_hopper_backward_feed.cuh"

namespace annulus::kernels {

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
    StartScores(0);
    LoadAhead(0);
    GroupWait<0>();
    GroupUse(scores_);
    // One starts half a tile behind the other and stays there: it has products while the other has
    // exponentials.
    if (kStagger && group_ == 1) BarrierOfRoles(kStartBarrier, Tile::kGroups * 128);
    int round = 0;
    for (; row_of_tile_ >= 0; ++round) Round(round);
    if (kStagger && group_ == 0 && round == 0) BarrierArrive(kStartBarrier, Tile::kGroups * 128);
    FinishQueryGradients(round);
    // The end of the walk, in a phase of its own: not that of the last tile, which other warps may still owe.
    WaitAt(small.sum_empty[group_], round + 1);
    WarpArrive(small.sum_full[group_]);
  }

  __device__ void Store(const GradientRows& dk, const GradientRows& dv) {
    GroupUse(dk_[0]);
    GroupUse(dv_[0]);
    WriteRows(dv_, kUnscaleWeight, row_, dv);
    WriteRows(dk_, 1, row_, dk);
  }

 private:
  static constexpr int kQueries = Tile::kQueries, kN = kQueries / 8, kStepN = kN / Tile::kSteps;
  static constexpr Major kIn = Major::kDepthInRow, kAcross = Major::kDepthAcrossRows;
  static constexpr bool kMiddle = Tile::kGradientColumns > 64;  // half a panel of three
  static constexpr bool kStagger = Tile::kDOutStages > 1;       // whether warpgroups can run apart
  static constexpr int kMathBarrier = 1, kStartBarrier = 2, kGroupBarrier = 3;

  using Packed = uint32_t[kQueries / 16][4];  // as left operand
  using Columns = float2[kN];                 // of two queries each
  using QueryGradients = float[Tile::kGradientColumns / 8][4];

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

  // The warpgroup's first row in a descriptor.
  __device__ uint64_t GroupRows() const { return static_cast<uint64_t>(group_ * 64 * 128 / 16); }

  __device__ __forceinline__ void StartScores(int stage) {
    const uint32_t k = Tile::kRoomy ? block_.shared : Recomputed(block_.shared);
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      const int chunk = Tile::PlaceOfPanel(d / 4) * 8 + d % 4 * 2;
      MultiplyShared<kIn, kIn>(scores_, OperandAt<Tile::kKeys>(k, 0, chunk) + GroupRows(),
                               OperandAt<kQueries>(block_.Q(stage), 0, 2 * d), d > 0);
    }
    GroupCommit();
  }
  __device__ __forceinline__ void StartWeightGradients(int stage, int step) {
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kValueDim / 16; ++d) {
      MultiplyShared<kIn, kIn>(dscores_,
                               OperandAt<Tile::kKeys>(block_.shared + Tile::kV, 0, 2 * d) + GroupRows(),
                               OperandAt<kQueries>(block_.DOut(stage), step * kStepN * 8, 2 * d), d > 0);
    }
    GroupCommit();
  }
  // dV += P^T dO.
  __device__ __forceinline__ void StartValueGradients(int stage, const Packed& weights) {
    GroupUse(dv_[0]);
    GroupFence();
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      MultiplyRegisters<kAcross>(dv_[0], weights[k], OperandAt<kQueries>(block_.DOut(stage), 16 * k, 0), 1);
    }
    GroupCommit();
  }
  // dK += dS^T Q.
  __device__ __forceinline__ void StartKeyGradients(int stage, uint32_t shared, const Packed& dscores) {
    GroupUse(dk_[0]);
    GroupFence();
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      const uint64_t q = OperandAt<kQueries>(block_.Q(stage), 16 * k, 0);
      if constexpr (Tile::kRoomy) {
        MultiplyRegisters<kAcross>(dk_[0], dscores[k], q, 1);
      } else {
        MultiplyShared<kIn, kAcross>(dk_[0], OperandAt<Tile::kKeys>(shared, 0, 2 * k) + GroupRows(), q, 1);
      }
    }
    GroupCommit();
  }
  // The warpgroup's part of dQ = dS K of a tile, of 64 query rows: of three panels of columns an outer one
  // and half of the middle one.
  __device__ __forceinline__ void StartQueryGradients(QueryGradients& dq, int round) {
    const int next = round + Tile::kDScoresStages, stage = next % Tile::kDScoresStages;
    WaitAt(block_.small.dscores_full[stage], next / Tile::kDScoresStages + 1);
    const uint32_t dscores = block_.DScores(stage) +
                             static_cast<uint32_t>(Tile::kByRows ? group_ * Tile::DScores::kPanelBytes : 0);
    const uint32_t k =
        block_.shared + static_cast<uint32_t>(Tile::kByRows ? 0 : group_ * Tile::K::kPanelBytes);
    // How much farther than a panel the columns of the middle one begin behind those of the outer one.
    const int farther = kMiddle ? (group_ == 0 ? Tile::K::kPanelBytes : 64) : 0;
    GroupFence();
#pragma unroll
    for (int key = 0; key < Tile::kKeys; key += 16) {
      MultiplyShared<kAcross, kAcross>(dq, OperandAt<Tile::kKeys>(dscores, key, 0),
                                       FartherPanels(OperandAt<Tile::kKeys>(k, key, 0), farther), key > 0);
    }
    GroupCommit();
  }

  // One query tile, from its S to that of the next one.
  __device__ __forceinline__ void Round(int round) {
    auto& small = block_.small;
    const int q = round % Tile::kQStages, dout = round % Tile::kDOutStages,
              stage = round % Tile::kDScoresStages;
    const auto& rows = small.rows[q];
    Packed weights, dscores;
    WaitAt(small.dout_full[dout], round / Tile::kDOutStages);
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if (!Tile::kRoomy) LoadColumns(rows.lse, step, lse_);
      StartWeightGradients(dout, step);
      masked_ ? Weigh<true>(rows, step) : Weigh<false>(rows, step);
      Columns delta;
      LoadColumns(rows.delta, step, delta);
      GroupWait<0>();
      GroupUse(dscores_);
      if (step == 0) WaitAt(small.dscores_empty[stage], (round + 1) / Tile::kDScoresStages + 1);
      Differentiate(delta, block_.DScores(stage), step, dscores);
    }
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) PackFragment(weights[k], scores_[2 * k], scores_[2 * k + 1]);
    StartValueGradients(dout, weights);
    if (Tile::kRoomy) StartKeyGradients(q, block_.DScores(stage), dscores);
    BulkFence();
    WarpArrive(small.dscores_full[stage]);
    if (kStagger && group_ == 0 && round == 0) BarrierArrive(kStartBarrier, Tile::kGroups * 128);
    if (!Tile::kRoomy) {
      BarrierOfRoles(kGroupBarrier + group_, 128);
      StartKeyGradients(q, block_.DScores(stage), dscores);
    }
    GroupWait<1>();  // the weights leave the registers
    WarpArrive(small.dout_empty[dout]);
    FinishRound(round);
  }

  // dQ of the tile before and S of the next one.
  __device__ __forceinline__ void FinishRound(int round) {
    auto& small = block_.small;
    const int next = (round + 1) % Tile::kQStages;
    QueryGradients dq;
    // Of the first tile there is none before: what it multiplies may be anything.
    StartQueryGradients(dq, round - 1);
    if (Tile::kRoomy) {
      WaitAt(small.q_full[next], (round + 1) / Tile::kQStages);
      StartScores(next);  // past the end of no consequence
      GroupWait<1>();
    } else {
      GroupWait<0>();
    }
    WarpArrive(small.q_empty[round % Tile::kQStages]);
    WarpArrive(small.dscores_empty[(round + 1) % Tile::kDScoresStages]);
    if (round > 0) StoreQueryGradients(dq, round - 1);
    if (!Tile::kRoomy) {
      WaitAt(small.q_full[next], (round + 1) / Tile::kQStages);
      StartScores(next);
    }
    LoadAhead(round + 1);
    GroupWait<0>();
    GroupUse(scores_);
    if (round > 0) ReportQueryGradients();
  }

  __device__ __forceinline__ void FinishQueryGradients(int round) {
    QueryGradients dq;
    StartQueryGradients(dq, round - 1);
    GroupWait<0>();
    if (round == 0) return;
    StoreQueryGradients(dq, round - 1);
    ReportQueryGradients();
  }

  // What is known of a tile while its S is in flight.
  __device__ __forceinline__ void LoadAhead(int round) {
    WaitAt(block_.small.rows_full[round % Tile::kQStages], round / Tile::kQStages);
    const auto& at = block_.small.way[round % Tile::kWay];
    row_of_tile_ = at.row;
    masked_ = at.masked;
    if constexpr (Tile::kRoomy) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        LoadColumns(block_.small.rows[round % Tile::kQStages].lse, step, lse_);
      }
    }
  }
  // Of the lane's columns of a step; of all steps where there is one.
  __device__ __forceinline__ void LoadColumns(const float2* from, int step, Columns& to) const {
#pragma unroll
    for (int i = 0; i < kStepN; ++i) to[step * kStepN + i] = from[(step * kStepN + i) * 4 + lane_ % 4];
  }

  template <bool kMasked>
  __device__ __forceinline__ void Weigh(const typename Tile::Rows& rows, int step) {
    const float scale = block_.args.scale * kLog2E;
    const int key = block_.key + row_ + lane_ / 4;
#pragma unroll
    for (int i = 0; i < kStepN; ++i) {
      const int n = step * kStepN + i;
      TwoKeyRows allowed;
      if (kMasked) allowed = rows.ranges[n * 4 + lane_ % 4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float weight = Exp2(fmaf(scores_[n][c], scale, c % 2 ? -lse_[n].y : -lse_[n].x));
        if (kMasked) {
          const int row = key + c / 2 * 8;
          if (row < allowed.rows[c % 2].begin || row >= allowed.rows[c % 2].end) weight = 0;
        }
        scores_[n][c] = weight;
      }
    }
  }

  // dS^T of the step, rounded, also to shared memory.
  __device__ __forceinline__ void Differentiate(const Columns& delta, uint32_t shared, int step,
                                                Packed& dscores) {
    const float factor = block_.args.scale * kUnscaleWeight;
    const uint32_t to = shared + Tile::DScores::LaneOffset(lane_, row_);
#pragma unroll
    for (int i = 0; i < kStepN; ++i) {
      const int n = step * kStepN + i;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        dscores_[i][c] = scores_[n][c] * fmaf(dscores_[i][c], factor, c % 2 ? delta[n].y : delta[n].x);
      }
      if (i % 2 == 0) continue;
      const int k = n / 2;
      PackFragment(dscores[k], dscores_[i - 1], dscores_[i]);
      StoreMatrices(Tile::DScores::At(to, 0, k), dscores[k]);
    }
  }

  // The warpgroup's part of dQ is panels of 32 columns and 64 rows, 16-byte chunk c of row r at place
  // c ^ (r % 8). Lanes of odd rows store in another order than those of even rows, so that half a warp falls
  // on distinct banks.
  __device__ __forceinline__ void StoreQueryGradients(QueryGradients& dq, int round) {
    GroupUse(dq);
    WaitAt(block_.small.sum_empty[group_], round + 1);
    constexpr uint32_t kPanel = 64 * 128;
    const int row = row_ % 64 + lane_ / 4;
    const bool odd = row % 2 == 1;
    const uint32_t to =
        block_.Sum(group_) +
        static_cast<uint32_t>(row * 128 + lane_ % 2 * 8 + ((lane_ % 4 / 2) ^ (row % 8) ^ (odd ? 4 : 0)) * 16);
    // The middle panel's half is behind the first outer panel and before the second.
    const uint32_t outer = to + (kMiddle && group_ == 1 ? kPanel : 0),
                   middle = to + (group_ == 0 ? 2 * kPanel : 0);
#pragma unroll
    for (int n = 0; n < Tile::kGradientColumns / 8; ++n) {
      const uint32_t at = ((n < 8 ? outer : middle) ^ static_cast<uint32_t>(n % 4 * 32)) +
                          static_cast<uint32_t>(n % 8 / 4) * kPanel;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = odd ? dq[n ^ 2][2 * half] : dq[n][2 * half],
                    y = odd ? dq[n ^ 2][2 * half + 1] : dq[n][2 * half + 1];
        StoreShared(at + static_cast<uint32_t>(half * 8 * 128), x, y);
      }
    }
  }

  // To the thread that adds them.
  __device__ __forceinline__ void ReportQueryGradients() {
    BulkFence();
    WarpArrive(block_.small.sum_full[group_]);
  }

  const HopperBackwardBlock<Tile>& block_;
  const int group_, lane_;
  const int row_;  // of the warp's first key
  int row_of_tile_;
  bool masked_;
  Columns lse_;
  float scores_[kN][4], dscores_[kStepN][4];
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
      if (warp == 0) LoadTiles(block, walk);
      if (warp == 3) LoadRows(block, walk);
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

template <int kDim, int kValueDim, int kSteps, int kQueries = HopperBackwardQueries(kDim)>
HopperBackwardKernel BackwardKernelOf() {
  using Added = HopperBackwardTile<kDim, kValueDim, kQueries, kSteps, MmaQueryGradient::kAtomic>;
  using Ordered = HopperBackwardTile<kDim, kValueDim, kQueries, kSteps, MmaQueryGradient::kOrdered>;
  const auto launch = [](const HopperBackwardArgs& args, MmaQueryGradient order, cudaStream_t stream) {
    return order == MmaQueryGradient::kAtomic ? LaunchHopperBackwardTile<Added>(args, stream)
                                              : LaunchHopperBackwardTile<Ordered>(args, stream);
  };
  const auto added = AttentionBackwardHopper<Added>, ordered = AttentionBackwardHopper<Ordered>;
  return {launch, reinterpret_cast<const void*>(added), reinterpret_cast<const void*>(ordered)};
}

}  // namespace annulus::kernels
