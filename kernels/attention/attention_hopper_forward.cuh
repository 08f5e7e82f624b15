#pragma once

// Forward of block attention on Hopper (after FlashAttention-3, Shah et al. 2024), with a carry. One thread
// block per multiprocessor takes tiles of query rows of one head, one after the other, and walks over the key
// tiles that some of its rows see.
//
//   loader (one thread)     Q      K0  K1  V0  K2  V1  K3  V2 ...              copy engine -> shared memory
//   math warpgroup 0           QK0 |  QK1 PV0 | softmax 1 | QK2 PV1 | softmax 2 | ...
//   math warpgroup 1                 softmax 0 |  QK1 PV0 | softmax 1 | QK2 PV1 | ...
//
// Each math warpgroup owns 64 rows. It starts Q K^T of a tile and weights times V of the one before together,
// and makes weights of the scores while the second still runs. Named barriers hand the tensor cores from
// warpgroup to warpgroup, so that one multiplies while another exponentiates.
//
// State per query row, in units of log2: max, sum of 2^(score - max), and acc = the sum's weighted values. It
// starts from the carry as (LSE, 1, O): the sum of exp(s - LSE) is one by the definition of LSE. max follows
// the largest score only when that is kSlack above it: weights stay below 2^kSlack, and acc is not rescaled
// for small steps.
//
// Floor: 2 (dim + v_dim) FLOP per visible (query, key) pair and head. In clocks of a multiprocessor (4096
// FLOP of bf16 products, 16 exponentials, 128 bytes of shared memory each), for a query tile against a key
// tile:
//
//   heads     tile        products   exponentials   shared memory   L2 to shared memory
//   64        192 x 128   1536       1536           1152            32 KB
//   128       128 x 128   2048       1024           1280            64 KB
//   192/128   128 x 128   2560       1024           1664            80 KB
//
// so heads of 64 are bound by exponentials as much as by products, and the others by products as long as the
// exponentials of one warpgroup run under the products of another. Shared memory: both operands of Q K^T (48
// of the 64 clocks of m64n128k16), V alone of the second product. Device memory: Q and O once, K and V once
// for each set of heads (ForwardOrder); a carry adds 8 v_dim bytes per row and head. Measured: nothing yet.
//
// The compiler keeps the products in flight only if no code between their start and GroupWait touches their
// accumulators (ptxas warns, C7510 to C7520), and moves a wait up over everything it sees no use of
// (MakeWeights).

#include <algorithm>

#include "kernels/attention/attention_hopper_launch.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_map.h"

namespace annulus::kernels {

// kWhole: starts from nothing, and only writes `result` and the LSE.
enum class ForwardMode { kWhole, kCarry };

// Where Q K^T reads Q: in shared memory, or in registers, which spares shared memory a third of its reads.
enum class QueryOperand { kShared, kRegisters };
// Whether warpgroups hand the tensor cores to each other, or take them as they come.
enum class Turns { kInOrder, kAsTheyCome };

template <int kDim_, int kValueDim_, int kGroups_, int kKeys_, int kStages_, int kQueryStages_,
          QueryOperand kQueryOperand_ = QueryOperand::kShared, Turns kTurns_ = Turns::kInOrder>
struct HopperForwardTile {
  static constexpr QueryOperand kQueryOperand = kQueryOperand_;
  static constexpr Turns kTurns = kTurns_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = kKeys_;
  static constexpr int kGroups = kGroups_;  // of warps that multiply, 64 query rows each
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kStages = kStages_, kQueryStages = kQueryStages_;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLoaderRegisters = kGroups == 2 ? 40 : 32, kMathRegisters = kGroups == 2 ? 232 : 160;
  using Q = SharedTile<kQueries, kDim>;
  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  static constexpr int kTileBytes = kQueryStages * Q::kBytes + kStages * (K::kBytes + V::kBytes);
  static_assert(kValueDim <= kDim);  // results leave through the place of Q
};

// Tiles in the order in which thread blocks take them: heads whose keys fit into L2 together, one such set
// after the other, and within each the longest tiles first.
struct ForwardOrder {
  int sets_of;  // heads, counted over all items, of a set
  int heads, query_tiles, tiles;
};
struct ForwardTileIndex {
  int item, head, query_tile;
};
__device__ inline ForwardTileIndex TileAt(const ForwardOrder& order, const int* query_tiles, int index,
                                          int all_heads) {
  const int in_set = order.sets_of * order.query_tiles, set = index / in_set;
  const int heads = min(order.sets_of, all_heads - set * order.sets_of), at = index - set * in_set;
  const int rank = at / heads, head = set * order.sets_of + (at - rank * heads);
  const int item = head / order.heads;
  return {item, head - item * order.heads, query_tiles[item * order.query_tiles + rank]};
}

struct HopperForwardArguments {
  CUtensorMap q, k, v, result;
  ForwardTables tables;
  ForwardOrder order;
  CudaHeads<float> out;
  float* lse;
  int q_rows, k_rows, batch, all_heads, heads_per_kv;
  bool has_result;
  float scale;  // of scores, in units of log2
};

// A tile as the loader hands it to the warpgroups; query_tile < 0: there are no more.
struct alignas(16) ForwardWork {
  ForwardTileIndex at;
  int padding;
  TileBounds keys;
};

template <typename Tile>
struct ForwardBarriers {
  uint64_t q_full[Tile::kQueryStages], q_empty[Tile::kQueryStages];
  uint64_t k_full[Tile::kStages], k_empty[Tile::kStages];
  uint64_t v_full[Tile::kStages], v_empty[Tile::kStages];
  uint64_t work_full[2], work_empty[2];
  ForwardWork work[2];
};
template <typename Tile>
inline constexpr int kForwardSharedBytes = Tile::kTileBytes + static_cast<int>(sizeof(ForwardBarriers<Tile>));

// Place of a ring of kCount buffers, with the parity of the phase in which the place is filled.
template <int kCount>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ uint32_t Of(const uint64_t (&barriers)[kCount]) const {
    return SharedAddress(barriers) + static_cast<uint32_t>(stage * 8);
  }
};

template <typename Tile>
struct ForwardShared {
  uint32_t q, k, v;  // of the first stages
  ForwardBarriers<Tile>& barriers;
  __device__ uint32_t Q(int stage) const { return q + static_cast<uint32_t>(stage * Tile::Q::kBytes); }
  __device__ uint32_t K(int stage) const { return k + static_cast<uint32_t>(stage * Tile::K::kBytes); }
  __device__ uint32_t V(int stage) const { return v + static_cast<uint32_t>(stage * Tile::V::kBytes); }
};

// Of one thread: takes tiles and starts the copies of their operands.
template <typename Tile>
__device__ void LoadForward(const HopperForwardArguments& arguments, const ForwardShared<Tile>& shared) {
  ForwardBarriers<Tile>& barriers = shared.barriers;
  RingPlace<Tile::kQueryStages> q_place;
  RingPlace<Tile::kStages> k_place, v_place;
  RingPlace<2> work_place;
  const ForwardOrder& order = arguments.order;
  const auto load_v = [&](int key, int panel, int item) {
    PhaseBarrierWait(v_place.Of(barriers.v_empty), v_place.parity ^ 1);
    PhaseBarrierExpect(v_place.Of(barriers.v_full), Tile::V::kBytes);
    LoadTile(shared.V(v_place.stage), arguments.v, v_place.Of(barriers.v_full), key, panel, item);
    v_place.Advance();
  };
  for (int index = static_cast<int>(blockIdx.x);;) {
    const int next = static_cast<int>(gridDim.x) + atomicAdd(arguments.tables.next, 1);
    ForwardWork work{{0, 0, -1}, 0, {0, 0, 0, 0}};
    if (index < order.tiles) {
      work.at = TileAt(order, arguments.tables.order, index, arguments.all_heads);
      work.keys = arguments.tables.bounds[work.at.item * order.query_tiles + work.at.query_tile];
    }
    const bool last = index >= order.tiles;
    index = next;
    if (!last && work.keys.empty() && !arguments.has_result) continue;

    PhaseBarrierWait(work_place.Of(barriers.work_empty), work_place.parity ^ 1);
    barriers.work[work_place.stage] = work;
    PhaseBarrierArrive(work_place.Of(barriers.work_full));
    work_place.Advance();
    if (last) return;

    PhaseBarrierWait(q_place.Of(barriers.q_empty), q_place.parity ^ 1);
    PhaseBarrierExpect(q_place.Of(barriers.q_full), Tile::Q::kBytes);
    LoadTile(shared.Q(q_place.stage), arguments.q, q_place.Of(barriers.q_full),
             work.at.query_tile * Tile::kQueries, work.at.head * (Tile::kDim / 64), work.at.item);
    q_place.Advance();
    const int kv_head = work.at.head / arguments.heads_per_kv, v_panel = kv_head * (Tile::kValueDim / 64);
    for (int key = work.keys.begin; key < work.keys.end; key += Tile::kKeys) {
      PhaseBarrierWait(k_place.Of(barriers.k_empty), k_place.parity ^ 1);
      PhaseBarrierExpect(k_place.Of(barriers.k_full), Tile::K::kBytes);
      LoadTile(shared.K(k_place.stage), arguments.k, k_place.Of(barriers.k_full), key,
               kv_head * (Tile::kDim / 64), work.at.item);
      k_place.Advance();
      if (key > work.keys.begin) load_v(key - Tile::kKeys, v_panel, work.at.item);
      if (key + Tile::kKeys >= work.keys.end) load_v(key, v_panel, work.at.item);
    }
  }
}

// Largest and sum over the four lanes that share a row of C.
__device__ inline float GroupQuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float GroupQuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// 64 query rows of a tile, of one warpgroup.
template <typename Tile, ForwardMode kMode>
class ForwardGroup {
 public:
  __device__ ForwardGroup(const HopperForwardArguments& arguments, const ForwardShared<Tile>& shared,
                          int group)
      : arguments_(arguments),
        shared_(shared),
        barriers_(shared.barriers),
        group_(group),
        lane_(static_cast<int>(threadIdx.x % 32)),
        row_(group * 64 + static_cast<int>(threadIdx.x / 32 % 4) * 16 + lane_ / 4) {}

  // All tiles of this thread block.
  __device__ void Run() {
    if (kTakeTurns && group_ == 0) BarrierArrive(kTurnBarrier, 256);  // the first turn
    for (;;) {
      PhaseBarrierWait(work_place_.Of(barriers_.work_full), work_place_.parity);
      work_ = barriers_.work[work_place_.stage];
      WarpArrives(work_place_.Of(barriers_.work_empty));
      work_place_.Advance();
      if (work_.at.query_tile < 0) break;
      RunTile();
    }
    if (threadIdx.x % 128 == 0) BulkWait();
  }

 private:
  static constexpr int kTurnBarrier = 1, kGroupBarrier = kTurnBarrier + Tile::kGroups;
  static constexpr bool kTakeTurns = Tile::kTurns == Turns::kInOrder;
  static constexpr float kSlack = 8;
  static constexpr int kScoreParts = Tile::kKeys / 8, kValueParts = Tile::kValueDim / 8;
  static constexpr Major kInRow = Major::kDepthInRow, kAcrossRows = Major::kDepthAcrossRows;

  __device__ void RunTile() {
    const TileBounds& keys = work_.keys;
    Load();
    PhaseBarrierWait(q_place_.Of(barriers_.q_full), q_place_.parity);
    if constexpr (Tile::kQueryOperand == QueryOperand::kRegisters) {
      const uint32_t q = shared_.Q(q_place_.stage) + Tile::Q::LaneOffset(lane_, row_ - lane_ / 4);
#pragma unroll
      for (int d = 0; d < Tile::kDim / 16; ++d) LoadMatrices(query_[d], Tile::Q::At(q, 0, d));
    }
    if (!keys.empty()) {
      WaitK();
      StartScores();
      GroupWait<0>();
      GroupUse(scores_);
      ReleaseK();
      MakeWeights(keys.begin);
      Rescale();
      Pack();
      int key = keys.begin + Tile::kKeys;
      for (; key < keys.end; key += Tile::kKeys) {
        WaitK();
        WaitTurn();
        StartScores();
        WaitV();
        StartValues();
        PassTurn();
        GroupWait<1>();
        GroupUse(scores_);
        ReleaseK();
        MakeWeights(key);
        GroupWait<0>();
        GroupUse(acc_);
        ReleaseV();
        Rescale();
        Pack();
      }
      WaitV();
      if (key > keys.end && keys.end < arguments_.k_rows) ClearValues(keys.end - (key - Tile::kKeys));
      StartValues();
      GroupWait<0>();
      GroupUse(acc_);
      ReleaseV();
    }
    Store();
    q_place_.Advance();
  }

  __device__ void Load() {
    changed_ = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = -kInfinity;
      sum_[half] = 0;
    }
#pragma unroll
    for (int n = 0; n < kValueParts; ++n) {
      for (int c = 0; c < 4; ++c) acc_[n][c] = 0;
    }
    if constexpr (kMode == ForwardMode::kCarry) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Row(half);
        const float lse = row < arguments_.q_rows ? arguments_.lse[StatIndex(row)] : -kInfinity;
        max_[half] = lse * kLog2E;
        if (lse == -kInfinity) continue;
        sum_[half] = lane_ % 4 == 0 ? 1 : 0;  // summed over the quad at the end
        const float* out = OutRow(row);
#pragma unroll
        for (int n = 0; n < kValueParts; ++n) {
          const float2 value = *reinterpret_cast<const float2*>(out + n * 8);
          acc_[n][2 * half] = value.x;
          acc_[n][2 * half + 1] = value.y;
        }
      }
    }
  }

  __device__ void WaitK() { PhaseBarrierWait(k_place_.Of(barriers_.k_full), k_place_.parity); }
  __device__ void WaitV() { PhaseBarrierWait(v_place_.Of(barriers_.v_full), v_place_.parity); }
  __device__ void ReleaseK() {
    WarpArrives(k_place_.Of(barriers_.k_empty));
    k_place_.Advance();
  }
  __device__ void ReleaseV() {
    WarpArrives(v_place_.Of(barriers_.v_empty));
    v_place_.Advance();
  }
  __device__ void WarpArrives(uint32_t barrier) {
    __syncwarp();
    if (lane_ == 0) PhaseBarrierArrive(barrier);
  }
  __device__ void WaitTurn() {
    if (kTakeTurns) BarrierOfRoles(kTurnBarrier + group_, 256);
  }
  __device__ void PassTurn() {
    if (kTakeTurns) BarrierArrive(kTurnBarrier + (group_ + 1 == Tile::kGroups ? 0 : group_ + 1), 256);
  }

  __device__ void StartScores() {
    const uint32_t k = shared_.K(k_place_.stage);
    GroupUse(scores_);
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      const uint64_t keys = OperandAt<Tile::kKeys>(k, 0, 2 * d);
      if constexpr (Tile::kQueryOperand == QueryOperand::kRegisters) {
        MultiplyRegisters<kInRow>(scores_, query_[d], keys, d > 0);
      } else {
        const uint32_t q = shared_.Q(q_place_.stage);
        MultiplyShared<kInRow, kInRow>(scores_, OperandAt<Tile::kQueries>(q, group_ * 64, 2 * d), keys,
                                       d > 0);
      }
    }
    GroupCommit();
  }

  __device__ void StartValues() {
    const uint32_t v = shared_.V(v_place_.stage);
    GroupUse(acc_);
    GroupFence();
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 16; ++i) {
      MultiplyRegisters<kAcrossRows>(acc_, weights_[i], OperandAt<Tile::kKeys>(v, 16 * i, 0), 1);
    }
    GroupCommit();
  }

  // Each way has its own Weigh: behind a common end of both, the compiler moves a later wait for the product
  // in flight before it, and nothing overlaps any more.
  __device__ void MakeWeights(int key) {
    if (work_.keys.Masks(key, key + Tile::kKeys)) {
      Mask(key);
      Weigh();
    } else {
      Weigh();
    }
  }

  // Scores outside the rows' ranges become -inf; `key` is the key row of the tile's first column.
  __device__ void Mask(int key) {
    key += lane_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRows range = Range(half);
      const auto first = static_cast<unsigned>(key - range.begin);
      const auto size = static_cast<unsigned>(range.end - range.begin);
#pragma unroll
      for (int n = 0; n < kScoreParts; ++n) {
        for (int c = 0; c < 2; ++c) {
          if (first + static_cast<unsigned>(n * 8 + c) >= size) scores_[n][2 * half + c] = -kInfinity;
        }
      }
    }
  }

  // Scores become weights relative to max_; what acc_ is to be multiplied with goes to correction_.
  __device__ void Weigh() {
    const float scale = arguments_.scale;
    changed_ = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = scores_[0][2 * half];
#pragma unroll
      for (int n = 0; n < kScoreParts; ++n) {
        for (int c = 2 * half; c < 2 * half + 2; ++c) largest = fmaxf(largest, scores_[n][c]);
      }
      largest = GroupQuadMax(largest) * scale;
      const bool rises = largest > max_[half] + kSlack;
      correction_[half] = 1;
      if (rises) {
        correction_[half] = Exp2(max_[half] - largest);
        max_[half] = largest;
        changed_ = true;
      }
      // A row that has not seen any key keeps -inf, and weights of zero.
      const float base = max_[half] == -kInfinity ? 0 : max_[half];
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kScoreParts; ++n) {
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          scores_[n][c] = Exp2(fmaf(scores_[n][c], scale, -base));
          sum += scores_[n][c];
        }
      }
      sum_[half] = fmaf(sum_[half], correction_[half], sum);
    }
    GroupUse(scores_);
  }

  __device__ void Rescale() {
    if (!__any_sync(~0u, changed_)) return;
#pragma unroll
    for (int n = 0; n < kValueParts; ++n) {
      for (int c = 0; c < 4; ++c) acc_[n][c] *= correction_[c / 2];
    }
  }

  __device__ void Pack() {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 16; ++i) PackFragment(weights_[i], scores_[2 * i], scores_[2 * i + 1]);
  }

  // Rows of V from `row` on, which no query of the tile sees, may hold anything: they become zeros. Each
  // warpgroup writes the same.
  __device__ void ClearValues(int row) {
    constexpr int kChunks = Tile::kValueDim / 8;
    const uint32_t v = shared_.V(v_place_.stage);
    for (int i = row * kChunks + static_cast<int>(threadIdx.x % 128); i < Tile::kKeys * kChunks; i += 128) {
      ClearShared16(v + Tile::V::Offset(i / kChunks, i % kChunks));
    }
    BulkFence();
    NamedBarrier(kGroupBarrier + group_, 128);
  }

  // Rows that saw no key of the block are not written, except to the rounded result.
  __device__ void Store() {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = GroupQuadSum(sum_[half]);
      inverse[half] = sum > 0 ? 1 / sum : 0;
      const int row = Row(half);
      if (row >= arguments_.q_rows) continue;
      if (kMode == ForwardMode::kCarry) {
        const KeyRows range = Range(half);
        if (range.begin >= range.end) continue;
        float* out = OutRow(row);
#pragma unroll
        for (int n = 0; n < kValueParts; ++n) {
          *reinterpret_cast<float2*>(out + n * 8) = {acc_[n][2 * half] * inverse[half],
                                                     acc_[n][2 * half + 1] * inverse[half]};
        }
      }
      if (lane_ % 4 == 0) arguments_.lse[StatIndex(row)] = (max_[half] + log2f(sum)) * kLn2;
    }
    if (arguments_.has_result) {
      StoreResult(inverse);
    } else {
      // Every warp is behind its last product.
      NamedBarrier(kGroupBarrier + group_, 128);
      if (threadIdx.x % 128 == 0) PhaseBarrierArrive(q_place_.Of(barriers_.q_empty));
    }
  }

  // Through the warpgroup's rows of Q, which nobody reads any more; the copy engine leaves out rows past the
  // last.
  __device__ void StoreResult(const float (&inverse)[2]) {
    const uint32_t q = shared_.Q(q_place_.stage);
    const uint32_t to = q + Tile::Q::LaneOffset(lane_, row_ - lane_ / 4);
    NamedBarrier(kGroupBarrier + group_, 128);
#pragma unroll
    for (int j = 0; j < kValueParts / 2; ++j) {
#pragma unroll
      for (int n = 2 * j; n < 2 * j + 2; ++n) {
        for (int c = 0; c < 4; ++c) acc_[n][c] *= inverse[c / 2];
      }
      uint32_t packed[4];
      PackFragment(packed, acc_[2 * j], acc_[2 * j + 1]);
      StoreMatrices(Tile::Q::At(to, 0, j), packed);
    }
    BulkFence();
    NamedBarrier(kGroupBarrier + group_, 128);
    if (threadIdx.x % 128 != 0) return;
#pragma unroll
    for (int panel = 0; panel < Tile::kValueDim / 64; ++panel) {
      StoreTile(arguments_.result,
                q + static_cast<uint32_t>(panel * Tile::Q::kPanelBytes + group_ * 64 * 128),
                work_.at.query_tile * Tile::kQueries + group_ * 64,
                work_.at.head * (Tile::kValueDim / 64) + panel, work_.at.item);
    }
    BulkCommit();
    BulkWaitRead();
    PhaseBarrierArrive(q_place_.Of(barriers_.q_empty));
  }

  __device__ int Row(int half) const { return work_.at.query_tile * Tile::kQueries + row_ + half * 8; }
  __device__ KeyRows Range(int half) const {
    const int64_t tile = work_.at.item * int64_t{arguments_.order.query_tiles} + work_.at.query_tile;
    return arguments_.tables.ranges[tile * Tile::kQueries + row_ + half * 8];
  }
  __device__ int64_t StatIndex(int64_t row) const {
    return (row * arguments_.batch + work_.at.item) * arguments_.order.heads + work_.at.head;
  }
  __device__ float* OutRow(int64_t row) const {
    return arguments_.out.data + row * arguments_.out.row_stride +
           work_.at.item * arguments_.out.batch_stride + work_.at.head * Tile::kValueDim + lane_ % 4 * 2;
  }

  const HopperForwardArguments& arguments_;
  const ForwardShared<Tile>& shared_;
  ForwardBarriers<Tile>& barriers_;
  const int group_, lane_, row_;  // row_: in the tile, of the first half
  RingPlace<Tile::kQueryStages> q_place_;
  RingPlace<Tile::kStages> k_place_, v_place_;
  RingPlace<2> work_place_;
  ForwardWork work_;
  float acc_[kValueParts][4], scores_[kScoreParts][4];
  uint32_t weights_[Tile::kKeys / 16][4];
  uint32_t query_[Tile::kDim / 16][4];  // QueryOperand::kRegisters
  float max_[2], sum_[2], correction_[2];
  bool changed_;
};

template <typename Tile>
__device__ void InitForwardBarriers(ForwardBarriers<Tile>& barriers) {
  const auto init = [](const auto& ring, int count) {
    for (const uint64_t& barrier : ring) PhaseBarrierInit(SharedAddress(&barrier), count);
  };
  init(barriers.q_full, 1);
  init(barriers.q_empty, Tile::kGroups);
  init(barriers.k_full, 1);
  init(barriers.k_empty, Tile::kGroups * 4);
  init(barriers.v_full, 1);
  init(barriers.v_empty, Tile::kGroups * 4);
  init(barriers.work_full, 1);
  init(barriers.work_empty, Tile::kGroups * 4);
  PhaseBarrierFence();
}

template <typename Tile, ForwardMode kMode>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    AttentionForwardHopper(const __grid_constant__ HopperForwardArguments arguments) {
  if constexpr (kHopper) {
    unsigned char* const memory = DynamicShared();
    auto& barriers = *reinterpret_cast<ForwardBarriers<Tile>*>(memory + Tile::kTileBytes);
    const uint32_t q = SharedAddress(memory), k = q + Tile::kQueryStages * Tile::Q::kBytes;
    const ForwardShared<Tile> shared{q, k, k + Tile::kStages * Tile::K::kBytes, barriers};
    if (threadIdx.x == 0) InitForwardBarriers<Tile>(barriers);
    __syncthreads();
    WaitForPredecessor();
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
    if (group == 0) {
      ShrinkRegisters<Tile::kLoaderRegisters>();
      if (threadIdx.x < 32 && ElectLane()) LoadForward<Tile>(arguments, shared);
    } else {
      GrowRegisters<Tile::kMathRegisters>();
      ForwardGroup<Tile, kMode>(arguments, shared, group - 1).Run();
    }
  }
}

// Heads, counted over all items, whose keys and values fill about half of L2 together: thread blocks at work
// on one set read them from there.
inline int HeadsPerSet(const HopperAttentionBlock& block) {
  constexpr int64_t kSetBytes = 24 << 20;
  const int64_t kv_bytes = block.k_rows * (block.dim + block.v_dim) * 2;
  const int64_t kv_heads =
      std::clamp<int64_t>(kSetBytes / std::max<int64_t>(kv_bytes, 1), 1, block.batch * block.kv_heads);
  return static_cast<int>(kv_heads * (block.heads / block.kv_heads));
}

template <typename Tile, ForwardMode kMode>
cudaError_t LaunchHopperForwardMode(const HopperForwardArguments& arguments, cudaStream_t stream) {
  const auto kernel = AttentionForwardHopper<Tile, kMode>;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kForwardSharedBytes<Tile>);
  if (error != cudaSuccess) return error;
  return LaunchEarly(kernel, dim3(static_cast<unsigned>(std::min(multiprocessors, arguments.order.tiles))),
                     Tile::kThreads, kForwardSharedBytes<Tile>, stream, arguments);
}

template <typename Tile>
cudaError_t LaunchHopperForward(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                void* workspace, cudaStream_t stream) {
  HopperForwardArguments arguments{};
  const auto panels = [&](const auto& x, int64_t rows, int64_t heads, int64_t dim) {
    return PanelsRef{x.data, rows, block.batch, heads * dim / 64, x.row_stride, x.batch_stride};
  };
  cudaError_t error = MakeTensorMap(panels(block.q, block.q_rows, block.heads, block.dim), Tile::kQueries,
                                    Tile::kDim / 64, &arguments.q);
  if (error != cudaSuccess) return error;
  if (block.k_rows > 0) {
    error = MakeTensorMap(panels(block.k, block.k_rows, block.kv_heads, block.dim), Tile::kKeys,
                          Tile::kDim / 64, &arguments.k);
    if (error != cudaSuccess) return error;
    error = MakeTensorMap(panels(block.v, block.k_rows, block.kv_heads, block.v_dim), Tile::kKeys,
                          Tile::kValueDim / 64, &arguments.v);
    if (error != cudaSuccess) return error;
  }
  arguments.has_result = partial.result.data != nullptr;
  if (arguments.has_result) {
    error = MakeTensorMap(panels(partial.result, block.q_rows, block.heads, block.v_dim), 64, 1,
                          &arguments.result);
    if (error != cudaSuccess) return error;
  }
  error = FillForwardTables(block, Tile::kQueries, workspace, &arguments.tables, stream);
  if (error != cudaSuccess) return error;
  arguments.out = partial.out;
  arguments.lse = partial.lse;
  arguments.q_rows = static_cast<int>(block.q_rows);
  arguments.k_rows = static_cast<int>(block.k_rows);
  arguments.batch = static_cast<int>(block.batch);
  arguments.all_heads = static_cast<int>(block.batch * block.heads);
  arguments.heads_per_kv = static_cast<int>(block.heads / block.kv_heads);
  arguments.scale = block.scale * kLog2E;
  const int query_tiles = arguments.tables.query_tiles;
  arguments.order = {HeadsPerSet(block), static_cast<int>(block.heads), query_tiles,
                     query_tiles * arguments.all_heads};
  return partial.out.data == nullptr ? LaunchHopperForwardMode<Tile, ForwardMode::kWhole>(arguments, stream)
                                     : LaunchHopperForwardMode<Tile, ForwardMode::kCarry>(arguments, stream);
}

}  // namespace annulus::kernels
