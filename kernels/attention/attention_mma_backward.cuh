#pragma once

// Backward of block attention on tensor cores, over key tiles. A thread block has 128 keys of one KV head and
// walks over a share of the query tiles that see them, of all query heads of the group: all of them where
// there are key tiles and KV heads enough for the device (attention_mma_backward_tables.cu). The weights are
// recomputed, transposed, from the LSE of all blocks together:
//
//   P^T = exp(K Q^T - LSE)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)
//   dV += P^T dO             dK += dS^T Q    dQ += dS K
//
// Registers hold one gradient of 32 keys per warp, not two, and with fewer keys shared memory would limit
// (see attention_mma_products.cuh). So warps work in pairs, one pair per 32 keys:
//
//   value warp:  P^T -> shared     dV += P^T dO    dQ of the tile before
//   key warp:    dQ of the tile before   dP^T    P^T from shared -> dS^T -> shared   dK += dS^T Q
//
// P^T and dS^T, rounded, are the left operands of dV and dK without leaving registers. A value warp and a key
// warp share a scheduler, so that the exponentials of one run under the products of the other. dQ sums over
// the keys of all warps: its product for a query tile is taken during the next tile, when one barrier per
// tile has made dS whole. It is added to global memory without an order: by the copy engine out of shared
// memory where there is one that adds, by atomics from registers elsewhere.
//
// What orders the accesses to shared memory, with B(r) the barrier of all warps that begins round r, the
// round of query tile r:
//
//   query tile r, stage r % 2    copies of round r - 1, B(r), read in round r, B(r + 1), copies of tile r + 2
//   P, buffer r % 2              value warp, handoff of round r, key warp of the same pair
//   dS, over P                   key warp, B(r + 1), read by all warps, B(r + 2), P of round r + 2
//   sum of dQ, by halves         copy engine has read, barrier of the half, stores, fence and barrier, copy
//   engine way, four slots              written two rounds before it is read, read for the last time one
//   round after
//
// Floor: 2 (3 dim + 2 v_dim) FLOP per visible (query, key) pair and head.

#include "attention_mma_launch.cuh"
#include "attention_mma_products.cuh"

namespace annulus::kernels {

template <int kDim_, int kValueDim_>
struct BackwardTile {
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kQueries = BackwardQueries(kDim);
  static constexpr int kM = 2, kPairs = 4;  // a pair of warps owns 16 kM keys
  static constexpr int kKeys = 16 * kM * kPairs, kThreads = 2 * kPairs * 32;
  static_assert(kKeys == kBackwardKeys);
  // Whether the copy engine adds dQ, where it can: one sum per row, which pays from 512 bytes on.
  static constexpr bool kBulkAdd = kDim >= 128;
  // dQ is shared out over the warps: value warps take the upper half of its rows, key warps the lower.
  static constexpr int kGradientRows = kQueries / 2, kGradientColumns = kDim / kPairs;
  // Whether a value warp waits for the key warp of its pair when P is ready. Where both come to that point at
  // about the same time the named barrier is the quickest; with keys of 192 the key warp, whose dQ comes
  // first, is so late that it costs 10%.
  static constexpr bool kValueWarpWaits = kDim <= 128;
  // Named barriers: one for each half of dQ, one for each pair, and one of all warps for the rounds, which is
  // not barrier 0, the one of __syncthreads. Value warps and key warps come to the latter two from different
  // code.
  static constexpr int kHalfBarrier = 1, kPairBarrier = 3, kRoundBarrier = kPairBarrier + kPairs;

  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  using Q = SharedTile<kQueries, kDim>;
  using DOut = SharedTile<kQueries, kValueDim>;
  using DScores = SharedTile<kKeys, 64>;  // P, then dS, transposed; kQueries of the 64 columns are used
  static constexpr int kRowBytes = kQueries * static_cast<int>(sizeof(RowStats));
  static_assert(sizeof(RowStats) == 8 && sizeof(KeyRows) == 8 && kRowBytes / 16 <= 32 && kQueries <= 64);

  // Shared memory: K, V, two buffers of dS, two stages of a query tile, and the sum of dQ where the copy
  // engine adds it, in rows 32 bytes too long so that the fragments of four rows fall on distinct banks.
  static constexpr int kDScores = K::kBytes + V::kBytes, kStages = kDScores + 2 * DScores::kBytes;
  static constexpr int kStageBytes = Q::kBytes + DOut::kBytes + 2 * kRowBytes;
  static constexpr int kSum = kStages + 2 * kStageBytes, kSumPitch = kDim * 4 + 32;
  static constexpr int kSharedBytes = kSum, kSumBytes = kBulkAdd ? kQueries * kSumPitch : 0;
};

// One query tile of the walk; negative past the end.
struct QueryTileAt {
  int tile, head;  // head within the group
  bool masked;
};

// The query tiles a thread block meets, in order: from a place in the query tiles [first, last) of one head
// on to the next heads, `left` of them, less those that do not touch the keys. One thread walks, two tiles
// ahead of the others, and leaves the way in shared memory: as registers of every thread it would spill.
struct QueryTileWalk {
  static constexpr int kAhead = 2, kSlots = 4;  // of the tiles before, at, and two after a round

  int item, key, kv_head, group;  // of the block: batch item, first key, KV head, its query heads
  int first, last, tile, head, left;
  QueryTileAt way[kSlots];

  // A share of what a tile of keys meets; after what is of the block.
  __device__ void Begin(int number, const KeyTileWork& work) {
    first = work.first, last = work.last;
    const int tiles = last - first;
    const int64_t all = int64_t{group} * tiles, begin = all * number / work.shares;
    head = static_cast<int>(begin / tiles);
    tile = first + static_cast<int>(begin % tiles);
    left = static_cast<int>(all * (number + 1) / work.shares - begin);
  }

  // Finds tile number `round`.
  __device__ void Find(int round, const TileBounds* bounds) {
    QueryTileAt& to = way[round % kSlots];
    to.tile = -1;
    for (; left > 0 && to.tile < 0; --left) {
      const TileBounds bound = bounds[tile];
      if (bound.Touches(key, key + kBackwardKeys)) to = {tile, head, bound.Masks(key, key + kBackwardKeys)};
      if (++tile == last) tile = first, ++head;
    }
  }
};

// A query tile in shared memory.
struct QueryTileStage {
  uint32_t q, dout;
  const RowStats* stats;
  const KeyRows* ranges;
  uint32_t dscores;  // the buffer of P and dS
  uint32_t parity;   // of the number of tiles before
};

// Where the fragments of columns 8n ... 8n + 7 of a warp's rows of dS^T go: rows g, and 8 rows further down.
template <typename Tile>
__device__ inline uint32_t DScoresAddress(uint32_t dscores, int row, int n, int lane) {
  return dscores + Tile::DScores::Offset(row + lane / 4, n) + static_cast<uint32_t>(lane % 4 * 4);
}

// P passes from the value warp of a pair to its key warp, once per query tile. (bar.arrive would be the third
// way: racecheck of compute-sanitizer then loses the order that the block's barrier gives to the pairs.)
template <typename Tile>
class WeightsHandoff {
 public:
  // `barriers` holds a phase barrier for each pair; unused where value warps wait.
  __device__ WeightsHandoff(int pair, const uint64_t* barriers)
      : pair_(pair), barrier_(SharedAddress(barriers + pair)) {}

  __device__ static void Init(const uint64_t* barriers) {
    if constexpr (!Tile::kValueWarpWaits) {
      for (int pair = 0; pair < Tile::kPairs; ++pair) PhaseBarrierInit(SharedAddress(barriers + pair), 32);
    }
  }
  // Every lane has stored its P.
  __device__ void Give() const {
    if constexpr (Tile::kValueWarpWaits) {
      BarrierOfRoles(Tile::kPairBarrier + pair_, 64);
    } else {
      PhaseBarrierArrive(barrier_);
    }
  }
  // P of the query tile is there; `parity` is of the number of tiles before.
  __device__ void Take(uint32_t parity) const {
    if constexpr (Tile::kValueWarpWaits) {
      BarrierOfRoles(Tile::kPairBarrier + pair_, 64);
    } else {
      PhaseBarrierWait(barrier_, parity);
    }
  }

 private:
  const int pair_;
  const uint32_t barrier_;
};

template <typename Tile>
class ValueWarp {
 public:
  static constexpr bool kQueryGradientFirst = false;

  __device__ ValueWarp(uint32_t shared, int pair, const uint64_t* barriers)
      : shared_(shared), row_(pair * 16 * Tile::kM), handoff_(pair, barriers) {
    Clear(dv_);
  }

  // `key` is the key row of the block's first key.
  __device__ void Step(const QueryTileStage& tile, float scale, bool masked, int key) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    MultiplyTransposed<typename Tile::K, typename Tile::Q, Tile::kM, Tile::kQueries, Tile::kDim>(
        weights_, shared_ + Tile::K::LaneOffset(lane, row_), tile.q + Tile::Q::CrossedLaneOffset(lane));
    if (masked) {
      Weigh<true>(tile, scale, key + row_ + lane / 4);
    } else {
      Weigh<false>(tile, scale, 0);
    }
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kQueries / 8; ++n) {
        const uint32_t to = DScoresAddress<Tile>(tile.dscores, row_ + m * 16, n, lane);
        StoreShared(to, PackHalf(weights_[m][n][0], weights_[m][n][1]));
        StoreShared(to + 8 * 128, PackHalf(weights_[m][n][2], weights_[m][n][3]));
      }
    }
    handoff_.Give();
    AddProduct<typename Tile::DOut, Tile::kM, Tile::kValueDim, Tile::kQueries>(
        dv_, weights_, tile.dout + Tile::DOut::LaneOffset(lane));
  }

  __device__ void Store(const GradientRows& dv) { WriteRows(dv_, kUnscaleWeight, row_, dv); }

 private:
  // `key` is the key row of the lane's first row.
  template <bool kMasked>
  __device__ void Weigh(const QueryTileStage& tile, float scale, int key) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < Tile::kQueries / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float lse[2] = {tile.stats[column].lse, tile.stats[column + 1].lse};
      KeyRows allowed[2];
      if (kMasked) allowed[0] = tile.ranges[column], allowed[1] = tile.ranges[column + 1];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float weight = Exp2(fmaf(weights_[m][n][c], scale, -lse[c % 2]));
          if (kMasked) {
            const int row = key + m * 16 + c / 2 * 8;
            if (row < allowed[c % 2].begin || row >= allowed[c % 2].end) weight = 0;
          }
          weights_[m][n][c] = weight;
        }
      }
    }
  }

  const uint32_t shared_;
  const int row_;
  const WeightsHandoff<Tile> handoff_;
  Fragments<Tile::kM, Tile::kQueries> weights_;
  Fragments<Tile::kM, Tile::kValueDim> dv_;
};

template <typename Tile, MmaQueryGradient kQueryGradient>
class KeyWarp {
 public:
  static constexpr bool kQueryGradientFirst = true;

  __device__ KeyWarp(uint32_t shared, int pair, const uint64_t* barriers)
      : shared_(shared), row_(pair * 16 * Tile::kM), handoff_(pair, barriers) {
    Clear(dk_);
  }

  __device__ void Step(const QueryTileStage& tile, float, bool, int) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    MultiplyTransposed<typename Tile::V, typename Tile::DOut, Tile::kM, Tile::kQueries, Tile::kValueDim>(
        dscores_t_, shared_ + Tile::K::kBytes + Tile::V::LaneOffset(lane, row_),
        tile.dout + Tile::DOut::CrossedLaneOffset(lane));
    handoff_.Take(tile.parity);
#pragma unroll
    for (int n = 0; n < Tile::kQueries / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float delta[2] = {tile.stats[column].delta, tile.stats[column + 1].delta};
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t at = DScoresAddress<Tile>(tile.dscores, row_ + m * 16, n, lane) +
                              static_cast<uint32_t>(half * 8 * 128);
          const float2 weight = UnpackHalf(LoadShared(at));
          float* dscore = dscores_t_[m][n] + 2 * half;
          dscore[0] = weight.x * (dscore[0] - delta[0]);
          dscore[1] = weight.y * (dscore[1] - delta[1]);
          if (kQueryGradient == MmaQueryGradient::kAtomic) StoreShared(at, PackBf16(dscore[0], dscore[1]));
        }
      }
    }
    AddProduct<typename Tile::Q, Tile::kM, Tile::kDim, Tile::kQueries>(dk_, dscores_t_,
                                                                       tile.q + Tile::Q::LaneOffset(lane));
  }

  __device__ void Store(float scale, const GradientRows& dk) {
    WriteRows(dk_, scale * kUnscaleWeight, row_, dk);
  }

 private:
  const uint32_t shared_;
  const int row_;
  const WeightsHandoff<Tile> handoff_;
  Fragments<Tile::kM, Tile::kQueries> dscores_t_;
  Fragments<Tile::kM, Tile::kDim> dk_;
};

// One warp's part of dQ of a query tile, dS K: the value warps take the upper rows, the key warps the lower,
// and in both halves each warp takes some columns.
template <typename Tile>
class QueryGradientPart {
 public:
  __device__ QueryGradientPart()
      : lane_(static_cast<int>(threadIdx.x % 32)),
        half_(static_cast<int>(threadIdx.x / 32 / Tile::kPairs)),
        part_(static_cast<int>(threadIdx.x / 32 % Tile::kPairs)),
        row_(half_ * Tile::kGradientRows),
        column_(part_ * Tile::kGradientColumns) {}

  // `dscores` is dS of all warps.
  __device__ void Multiply(uint32_t dscores, uint32_t k) {
    const uint32_t dscores_lane = dscores + Tile::DScores::CrossedLaneOffset(lane_, 0, row_ / 8);
    uint32_t k_lane[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n) k_lane[n] = k + Tile::K::LaneOffset(lane_, 0, column_ / 8 + 2 * n);
    Clear(sum_);
#pragma unroll
    for (int key = 0; key < Tile::kKeys / 16; ++key) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) LoadMatricesTransposed(a[m], Tile::DScores::At(dscores_lane, key, m));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t b[4];
        LoadMatricesTransposed(b, Tile::K::At(k_lane[n], key, 0));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          MultiplyAdd(sum_[m][2 * n], a[m], b[0], b[1]);
          MultiplyAdd(sum_[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // dq[0, rows) += scale dS K, through `sums` in shared memory.
  __device__ void BulkAddTo(float* dq, int64_t stride, int rows, float scale, uint32_t sums) const {
    constexpr int kThreads = Tile::kPairs * 32, kRowsPerWarp = Tile::kGradientRows / Tile::kPairs;
    BulkWaitRead();  // the sums of the query tile before
    NamedBarrier(Tile::kHalfBarrier + half_, kThreads);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const uint32_t to = sums + static_cast<uint32_t>((row_ + m * 16 + lane_ / 4) * Tile::kSumPitch +
                                                       (column_ + lane_ % 4 * 2) * 4);
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        StoreShared(to + static_cast<uint32_t>(n * 32), scale * sum_[m][n][0], scale * sum_[m][n][1]);
        StoreShared(to + static_cast<uint32_t>(8 * Tile::kSumPitch + n * 32), scale * sum_[m][n][2],
                    scale * sum_[m][n][3]);
      }
    }
    BulkFence();
    NamedBarrier(Tile::kHalfBarrier + half_, kThreads);
    const int row = row_ + part_ * kRowsPerWarp;
    if (ElectLane()) {
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        if (row + r >= rows) break;
        BulkAdd(dq + (row + r) * stride, sums + static_cast<uint32_t>((row + r) * Tile::kSumPitch),
                Tile::kDim * 4);
      }
    }
    BulkCommit();
  }

  // The same by atomics.
  __device__ void AtomicAddTo(float* dq, int64_t stride, int rows, float scale) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const FragmentRow four = GatherRow(sum_[m][n], lane_);
        const int row = row_ + m * 16 + four.row;
        if (row >= rows) continue;
        AtomicAdd4(dq + row * stride + column_ + n * 8 + four.column, scale * four.x, scale * four.y,
                   scale * four.z, scale * four.w);
      }
    }
  }

 private:
  static constexpr int kM = Tile::kGradientRows / 16, kN = Tile::kGradientColumns / 16;

  const int lane_, half_, part_, row_, column_;
  Fragments<kM, Tile::kGradientColumns> sum_;
};

// One block of keys and what its threads share.
template <typename Tile>
struct BackwardKeyBlock {
  const MmaAttentionBlock& block;
  const MmaAttentionGradients& gradients;
  const BackwardTables& tables;
  unsigned char* memory;
  uint32_t shared;  // its address
  QueryTileWalk* walk;

  __device__ int64_t item() const { return walk->item; }
  __device__ int64_t kv_head() const { return walk->kv_head; }
  __device__ int key() const { return walk->key; }
  __device__ int64_t head(const QueryTileAt& at) const { return kv_head() * walk->group + at.head; }

  // By one thread.
  __device__ void FindQueryTile(int round) const {
    walk->Find(round, tables.bounds + item() * tables.query_tiles);
  }
  __device__ QueryTileStage Stage(int stage) const {
    const int at = Tile::kStages + stage * Tile::kStageBytes;
    const uint32_t q = shared + static_cast<uint32_t>(at);
    const unsigned char* rows = memory + at + Tile::Q::kBytes + Tile::DOut::kBytes;
    return {q,
            q + Tile::Q::kBytes,
            reinterpret_cast<const RowStats*>(rows),
            reinterpret_cast<const KeyRows*>(rows + Tile::kRowBytes),
            DScores(stage),
            static_cast<uint32_t>(stage)};
  }
  __device__ uint32_t DScores(int buffer) const {
    return shared + static_cast<uint32_t>(Tile::kDScores + buffer * Tile::DScores::kBytes);
  }

  // Keys no query sees are not read.
  __device__ void LoadKeys(int item, int key, int64_t kv_head, const KeyTileWork& work) const {
    const auto &k = block.k, &v = block.v;
    Tile::K::template Load<Tile::kThreads>(
        shared, k.data + key * k.row_stride + item * k.batch_stride + kv_head * Tile::kDim, k.row_stride,
        work.begin, work.end);
    Tile::V::template Load<Tile::kThreads>(
        shared + Tile::K::kBytes,
        v.data + key * v.row_stride + item * v.batch_stride + kv_head * Tile::kValueDim, v.row_stride,
        work.begin, work.end);
  }
  __device__ void LoadQueries(const QueryTileAt& at, int stage) const {
    const uint32_t to = Stage(stage).q;
    const int64_t row = int64_t{at.tile} * Tile::kQueries;
    const int rows = static_cast<int>(min(int64_t{Tile::kQueries}, block.q_rows - row));
    const auto &q = block.q, &dout = gradients.dout;
    Tile::Q::template Load<Tile::kThreads>(
        to, q.data + row * q.row_stride + item() * q.batch_stride + head(at) * Tile::kDim, q.row_stride, 0,
        rows);
    Tile::DOut::template Load<Tile::kThreads>(
        to + Tile::Q::kBytes,
        dout.data + row * dout.row_stride + item() * dout.batch_stride + head(at) * Tile::kValueDim,
        dout.row_stride, 0, rows);
    const int chunk = static_cast<int>(threadIdx.x % 32);  // two rows each
    if (chunk < Tile::kRowBytes / 16 && threadIdx.x < 64) {
      const uint32_t table = to + Tile::Q::kBytes + Tile::DOut::kBytes + static_cast<uint32_t>(chunk * 16);
      if (threadIdx.x < 32) {
        CopyAsync16(table,
                    tables.stats + (item() * block.heads + head(at)) * tables.padded_rows + row + chunk * 2,
                    true);
      } else {
        CopyAsync16(table + Tile::kRowBytes, tables.ranges + item() * tables.padded_rows + row + chunk * 2,
                    true);
      }
    }
  }

  // dQ of a query tile whose dS is in `buffer`.
  __device__ void AddQueryGradients(const QueryTileAt& at, int buffer) const {
    QueryGradientPart<Tile> part;
    part.Multiply(DScores(buffer), shared);
    const int64_t row = int64_t{at.tile} * Tile::kQueries;
    const int rows = static_cast<int>(min(int64_t{Tile::kQueries}, block.q_rows - row));
    const float scale = block.scale * kUnscaleWeight;
    const auto& dq = gradients.dq;
    float* to = dq.data + row * dq.row_stride + item() * dq.batch_stride + head(at) * Tile::kDim;
    if constexpr (kHasBulkAdd && Tile::kBulkAdd) {
      part.BulkAddTo(to, dq.row_stride, rows, scale, shared + Tile::kSum);
    } else {
      part.AtomicAddTo(to, dq.row_stride, rows, scale);
    }
  }

  // The block's rows of dk or dv, kColumns wide, whose sums of shares begin at `column`; keys no query sees
  // are not touched.
  template <MmaQueryGradient kQueryGradient, int kColumns>
  __device__ GradientRows Rows(const CudaHeads<float>& x, int column) const {
    // Read again: as registers through the walk they would spill.
    const BackwardShare share = tables.shares[blockIdx.x];
    const KeyTileWork work = tables.work[share.key_tile];
    if (kQueryGradient == MmaQueryGradient::kOrdered && work.shares > 1) {
      constexpr int kWidth = Tile::kDim + Tile::kValueDim;
      const int64_t slot = kv_head() * tables.slots + work.slot + share.number;
      return {tables.sums + slot * Tile::kKeys * kWidth + column, kWidth, work.begin, work.end,
              RowWrite::kSet};
    }
    constexpr bool kAtomic = kQueryGradient == MmaQueryGradient::kAtomic;
    return {x.data + key() * x.row_stride + item() * x.batch_stride + kv_head() * kColumns, x.row_stride,
            work.begin, work.end, kAtomic ? RowWrite::kAtomicAdd : RowWrite::kAdd};
  }
};

// The rounds of one warp. All warps meet at the same barriers, value warps in one copy of this code, key
// warps in another.
template <MmaQueryGradient kQueryGradient, typename Tile, typename Warp>
__device__ void WalkQueryTiles(const BackwardKeyBlock<Tile>& keys, Warp& warp) {
  constexpr bool kSum = kQueryGradient == MmaQueryGradient::kAtomic;
  const float scale = keys.block.scale * kLog2E;
  const QueryTileAt* way = keys.walk->way;
  // One round more than there are tiles, for the last tile's dQ: the code of a round exists once, which
  // matters to the instruction cache.
  bool more = true;
  for (int round = 0; more; ++round) {
    // This query tile has landed, and every warp is done with the one before but for its dQ.
    CopyAsyncWait<0>();
    BarrierOfRoles(Tile::kRoundBarrier, Tile::kThreads);
    const QueryTileAt &at = way[round % QueryTileWalk::kSlots],
                      &next = way[(round + 1) % QueryTileWalk::kSlots];
    const int stage = round % 2;
    more = at.tile >= 0;
    if (more && next.tile >= 0) keys.LoadQueries(next, stage ^ 1);
    CopyAsyncCommit();
    if (threadIdx.x == 0) keys.FindQueryTile(round + QueryTileWalk::kAhead);
    const auto add_before = [&] {
      if (round > 0) keys.AddQueryGradients(way[(round - 1) % QueryTileWalk::kSlots], stage ^ 1);
    };
    if (kSum && Warp::kQueryGradientFirst) add_before();
    if (more) warp.Step(keys.Stage(stage), scale, at.masked, keys.key());
    if (kSum && !Warp::kQueryGradientFirst) add_before();
  }
  if (kSum) BulkWait();
}

template <typename Tile, MmaQueryGradient kQueryGradient>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    AttentionBackwardMma(const __grid_constant__ MmaAttentionBlock block,
                         const __grid_constant__ MmaAttentionGradients gradients,
                         const __grid_constant__ BackwardTables tables) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ QueryTileWalk walk;
  __shared__ uint64_t barriers[Tile::kPairs];
  const BackwardShare share = tables.shares[blockIdx.x];
  if (share.key_tile < 0) return;
  const KeyTileWork work = tables.work[share.key_tile];
  const BackwardKeyBlock<Tile> keys{block, gradients, tables, shared, SharedAddress(shared), &walk};
  const int item = share.key_tile / tables.key_tiles, key = share.key_tile % tables.key_tiles * Tile::kKeys;
  if (threadIdx.x == 0) {
    walk.item = item, walk.key = key, walk.kv_head = share.kv_head;
    walk.group = static_cast<int>(block.heads / block.kv_heads);
    walk.Begin(share.number, work);
    WeightsHandoff<Tile>::Init(barriers);
    for (int round = 0; round < QueryTileWalk::kAhead; ++round) keys.FindQueryTile(round);
  }
  keys.LoadKeys(item, key, share.kv_head, work);
  __syncthreads();
  if (walk.way[0].tile >= 0) keys.LoadQueries(walk.way[0], 0);
  CopyAsyncCommit();

  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp < Tile::kPairs) {
    ValueWarp<Tile> values(keys.shared, warp, barriers);
    WalkQueryTiles<kQueryGradient>(keys, values);
    values.Store(keys.template Rows<kQueryGradient, Tile::kValueDim>(gradients.dv, Tile::kDim));
  } else {
    KeyWarp<Tile, kQueryGradient> warp_keys(keys.shared, warp - Tile::kPairs, barriers);
    WalkQueryTiles<kQueryGradient>(keys, warp_keys);
    warp_keys.Store(block.scale, keys.template Rows<kQueryGradient, Tile::kDim>(gradients.dk, 0));
  }
}

template <typename Tile, MmaQueryGradient kQueryGradient>
cudaError_t LaunchBackward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                           const BackwardTables& tables, cudaStream_t stream) {
  const auto kernel = AttentionBackwardMma<Tile, kQueryGradient>;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const bool bulk_add = major >= 9 && kQueryGradient == MmaQueryGradient::kAtomic;
  const int bytes = Tile::kSharedBytes + (bulk_add ? Tile::kSumBytes : 0);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(tables.most_shares), Tile::kThreads, bytes, stream>>>(block, gradients,
                                                                                       tables);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
