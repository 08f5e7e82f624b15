#pragma once

// Forward of block attention on Hopper (after FlashAttention-3, Shah et al. 2024), with a carry. One thread
// block per multiprocessor takes tiles of query rows of one head, one after the other, and walks over the key
// tiles that some of its rows see. Here a tile of three key tiles, and the next one:
//
//   loader (one thread)   Q  K0  K1 V0  K2 V1 V2  Q' K0'  K1' V0' ...            copy engine -> shared memory
//   math warpgroup 0      QK0  QK1 PV0 | softmax 1 | QK2 PV1 | softmax 2 | QK0' PV2 | softmax 0', store | ...
//   math warpgroup 1      QK0  softmax 0 | QK1 PV0 | softmax 1 | QK2 PV1 | softmax 2 | QK0' PV2 | ...
//
// Each math warpgroup owns 64 rows. It starts Q K^T of a tile and weights times V of the one before together,
// and makes weights of the scores while the second still runs; across query tiles too, so that only the store
// stands between them. Named barriers hand the tensor cores from warpgroup to warpgroup, so that one
// multiplies while another exponentiates; with heads of 128 they find that order by themselves, 1% faster
// (Turns).
//
// State per query row, in units of log2: a reference, the sum of 2^(score - reference), and acc = the sum's
// weighted values. The reference is set kSlack above the largest score of the first key tile and rises when a
// score passes it; so weights are made of scores at once (WeighAhead), with no maximum to wait for, and a
// weight of 2 or more shows that one was needed: then the warp makes its scores again, by itself, and weighs
// them the long way (Weigh). The carry (O, LSE) is a partial result like the sums of a tile, and is merged
// with them where the tile is stored. Its rows are brought behind the tile's last scores, while the last
// values are multiplied: half to registers, half to shared memory, as far as there is room (FetchCarry).
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
// for each set of heads (ForwardOrder); a carry adds 8 v_dim bytes per row and head.
//
// Measured on one H200, 16 heads, beside cuDNN 9 (in brackets) in turns, which shares the clock that the
// power limit leaves, 1.4 GHz in the first two columns to 1.8: percent of the tensor cores' clocks that
// products fill.
//
//   heads     causal 32K   full 32K   causal 8K   documents of 4K in 32K
//   64        61 (56)      65 (58)    45 (45)     50
//   128       85 (73)      88 (75)    72 (61)     73
//   192/128   91 (72)      94 (73)    74 (60)     80
//
// Heads of 128, a window of 4K in 128K rows: 82; a carry over 8 chunks of 8K keys 86, causal 85, all 64K at
// once 88. At 1.44 GHz one percent is 7.8 TFLOP/s. Power limits long sequences of 128 and more; below it, and
// for heads of 64, the chain of one warpgroup from scores to weights: exponentials are 43% busy with heads of
// 128, issue slots 34% (46% with 64). Of a carry, stores and what begins with each tile are left: neither
// 16-byte stores nor the copy engine's were faster. Of documents' products 5% (128 rows) to 8% are masked.
//
// The compiler keeps the products in flight only if no code between their start and GroupWait touches their
// accumulators (ptxas warns, C7510 to C7520), and moves a wait up over everything it sees no use of
// (MakeWeights). The loop over key tiles has its own code, apart from the step into the next query tile: with
// both in one loop it moves accumulators between registers in every step.

#include "kernels/attention/attention_hopper_forward_feed.cuh"

namespace annulus::kernels {

// 64 query rows of a tile, of one warpgroup.
template <typename Tile, ForwardMode kMode, typename Arguments>
class ForwardGroup {
 public:
  __device__ ForwardGroup(const Arguments& arguments, const ForwardShared<Tile>& shared, int group)
      : arguments_(arguments),
        shared_(shared),
        barriers_(shared.barriers),
        group_(group),
        lane_(static_cast<int>(threadIdx.x % 32)),
        row_(group * 64 + static_cast<int>(threadIdx.x / 32 % 4) * 16 + lane_ / 4) {}

  __device__ void Run() {
    if (kTakeTurns && group_ == 0) BarrierArrive(kTurnBarrier, 256);  // the first turn
    if constexpr (kMode == ForwardMode::kArena) {
      while (Take()) {
        RunTiles();
        ReleaseV();
      }
    } else {
      if (Take()) RunTiles();
    }
  }

 private:
  static constexpr int kTurnBarrier = 1, kGroupBarrier = kTurnBarrier + Tile::kGroups;
  static constexpr bool kTakeTurns = Tile::kTurns == Turns::kInOrder;
  static constexpr float kSlack = 8;
  static constexpr int kScoreParts = Tile::kKeys / 8, kValueParts = Tile::kValueDim / 8;
  static constexpr Major kInRow = Major::kDepthInRow, kAcrossRows = Major::kDepthAcrossRows;

  // The tile that was taken and all that follow it without a pause. A step starts the scores of one key tile
  // and the values of the one before, which may be the last of the query tile before.
  __device__ void RunTiles() {
    WaitK();
    StartScores();
    GroupWait<0>();
    GroupUse(scores_);
    MakeWeights();
    ReleaseK();
    ClearSums();
    Pack();
    for (;;) {
      const int end = work_.keys.end;
      for (key_ += Tile::kKeys; key_ < end; key_ += Tile::kKeys) {
        Step();
        Rescale();
        Pack();
      }
      if constexpr (kMode == ForwardMode::kArena) {
        if (work_.part.more()) {
          TakeMore();
          Step();
          Rescale();
          Pack();
          continue;
        }
      }
      Finish();
      if (!Take()) break;
      Step();
      Store();
      ClearSums();
      Pack();
    }
    StartValues();
    GroupWait<0>();
    GroupUse(acc_);
    Store();
  }

  __device__ void Step() {
    WaitK();
    WaitTurn();
    StartScores();
    WaitV();
    StartValues();
    PassTurn();
    GroupWait<1>();
    GroupUse(scores_);
    MakeWeights();
    ReleaseK();
    GroupWait<0>();
    GroupUse(acc_);
    ReleaseV();
  }

  // The next tile, from nothing; false if there are no more, in kArena none for now.
  __device__ bool Take() {
    PhaseBarrierWait(work_place_.Of(barriers_.work_full), work_place_.parity);
    work_ = barriers_.work[work_place_.stage];
    work_place_.Advance();
    if (work_.at.query_tile < 0) {
      if (kMode == ForwardMode::kArena) WarpArrives(SharedAddress(&barriers_.work_empty[WorkStage()]));
      return false;
    }
    key_ = work_.keys.begin;
    ready_ = false;
    for (int half = 0; half < 2; ++half) {
      reference_[half] = -kInfinity;
      sum_[half] = 0;
      ranges_[half] = Range(half);
    }
    PhaseBarrierWait(q_place_.Of(barriers_.q_full), q_place_.parity);
    return true;
  }

  // The next part of the tile at work, behind the last scores of this one.
  __device__ void TakeMore() {
    WaitValues();
    WarpArrives(SharedAddress(&barriers_.work_empty[WorkStage()]));
    PhaseBarrierWait(work_place_.Of(barriers_.work_full), work_place_.parity);
    work_ = barriers_.work[work_place_.stage];
    work_place_.Advance();
    key_ = work_.keys.begin;
    for (int half = 0; half < 2; ++half) ranges_[half] = Range(half);
  }

  // Behind the last scores of a tile, before its last values.
  __device__ void Finish() {
    WarpArrives(q_place_.Of(barriers_.q_empty));
    q_place_.Advance();
    finished_ = {WorkStage(), {reference_[0], reference_[1]}, {sum_[0], sum_[1]}};
    if constexpr (kMode == ForwardMode::kCarry) FetchCarry();
    WaitValues();
  }

  // The last of the keys at work.
  __device__ void WaitValues() {
    WaitV();
    const int end = work_.keys.end;
    if (key_ > end && end < arguments_.k_rows) ClearValues(end - (key_ - Tile::kKeys));
  }

  __device__ void ClearSums() {
#pragma unroll
    for (int n = 0; n < kValueParts; ++n) {
      for (int c = 0; c < 4; ++c) acc_[n][c] = 0;
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
    const uint32_t q = shared_.Q(q_place_.stage), k = shared_.K(k_place_.stage);
    GroupUse(scores_);
    GroupFence();
#pragma unroll
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      MultiplyShared<kInRow, kInRow>(scores_, OperandAt<Tile::kQueries>(q, group_ * 64, 2 * d),
                                     OperandAt<Tile::kKeys>(k, 0, 2 * d), d > 0);
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
  __device__ void MakeWeights() {
    if (work_.keys.Masks(key_, key_ + Tile::kKeys)) {
      Mask();
      Weigh();
    } else if (!ready_ || !WeighAhead()) {
      Weigh();
    }
  }

  // Weights by the references as they are, without a look at the largest score first: false, with the scores
  // made again, where a weight shows that a reference has to rise.
  __device__ bool WeighAhead() {
    const float scale = arguments_.scale;
    float sums[1][4] = {};
    int bits = 0;
#pragma unroll
    for (int n = 0; n < kScoreParts; ++n) {
      for (int c = 0; c < 4; ++c) {
        scores_[n][c] = Exp2(fmaf(scores_[n][c], scale, -reference_[c / 2]));
        sums[0][c] += scores_[n][c];
      }
      for (int c = 0; c < 4; c += 2)
        bits |= __float_as_int(scores_[n][c]) | __float_as_int(scores_[n][c + 1]);
    }
    GroupUse(sums);  // all additions are under the exponentials
    changed_ = false;
    // The highest bit of the exponent: 2 and above, or not a number.
    if (__any_sync(~0u, bits & 1 << 30)) {
      ScoresAgain();
      return false;
    }
    for (int half = 0; half < 2; ++half) sum_[half] += sums[0][2 * half] + sums[0][2 * half + 1];
    GroupUse(scores_);
    return true;
  }

  // By this warp alone.
  __device__ void ScoresAgain() {
    const uint32_t q = shared_.Q(q_place_.stage) + Tile::Q::LaneOffset(lane_, row_ - lane_ / 4),
                   k = shared_.K(k_place_.stage) + Tile::K::CrossedLaneOffset(lane_);
#pragma unroll
    for (int n = 0; n < kScoreParts; ++n) {
      for (int c = 0; c < 4; ++c) scores_[n][c] = 0;
    }
#pragma unroll 1
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      uint32_t rows[4];
      LoadMatrices(rows, Tile::Q::At(q, 0, d));
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 16; ++n) {
        uint32_t keys[4];
        LoadMatrices(keys, Tile::K::At(k, n, d));
        MultiplyAdd(scores_[2 * n], rows, keys[0], keys[1]);
        MultiplyAdd(scores_[2 * n + 1], rows, keys[2], keys[3]);
      }
    }
  }

  // Scores outside the rows' ranges become -inf.
  __device__ void Mask() {
    const int key = key_ + lane_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRows range = ranges_[half];
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

  // Scores become weights; what acc_ is to be multiplied with goes to correction_.
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
      largest = QuadMax(largest) * scale;
      correction_[half] = 1;
      if (largest > reference_[half]) {
        correction_[half] = Exp2(reference_[half] - (largest + kSlack));
        reference_[half] = largest + kSlack;
        changed_ = true;
      }
      // A row that has not seen any key keeps -inf, and weights of zero.
      const float base = reference_[half] == -kInfinity ? 0 : reference_[half];
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
    ready_ = __all_sync(~0u, reference_[0] > -kInfinity && reference_[1] > -kInfinity);
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
    for (int i = 0; i < Tile::kKeys / 16; ++i) {
      PackFragment(weights_[i], scores_[2 * i], scores_[2 * i + 1]);
    }
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

  // Whether the carry's rows of a half wait in shared memory between FetchCarry and Store. Of the others the
  // first half waits in registers; the second is loaded when it is needed.
  template <int kHalf>
  static constexpr bool kStaged = (kMode == ForwardMode::kCarry) && (kHalf >= 2 - Tile::kStagedHalves);
  // One of the warp's 8.
  template <int kHalf>
  __device__ unsigned char* StagedRow(int row) const {
    constexpr int kPlace = kHalf - (2 - Tile::kStagedHalves);
    const int warp = static_cast<int>(threadIdx.x / 32) - 4;
    return shared_.carry + kPlace * Tile::kCarryHalfBytes + (warp * 8 + row) * Tile::kCarryRowBytes;
  }

  // Starts to bring the carry of the tile at work.
  __device__ void FetchCarry() {
    __syncwarp();  // the rows before are read
    FetchHalf<0>();
    FetchHalf<1>();
    CopyAsyncCommit();
  }
  template <int kHalf>
  __device__ void FetchHalf() {
    const ForwardTileIndex& at = work_.at;
    const bool inside = Row(at, kHalf) < arguments_.q_rows;
    carried_[kHalf] = inside ? arguments_.lse[StatIndex(at, kHalf)] * kLog2E : -kInfinity;
    if constexpr (kStaged<kHalf>) {
      constexpr int kChunks = Tile::kValueDim / 4;  // of 16 bytes
#pragma unroll
      for (int i = 0; i < kChunks / 4; ++i) {
        const int row = (i * 32 + lane_) / kChunks, chunk = (i * 32 + lane_) % kChunks;
        const int of_all = Row(at, kHalf) - lane_ / 4 + row;
        if (of_all >= arguments_.q_rows) continue;
        CopyAsync16(SharedAddress(StagedRow<kHalf>(row) + chunk * 16),
                    RowOf(arguments_.out, at, of_all) + chunk * 4);
      }
    } else if (kHalf == 0 && inside) {
      LoadRow(RowOf(arguments_.out, at, Row(at, kHalf)), ahead_);
    }
  }
  // The lane's columns.
  __device__ void LoadRow(const float* row, float2* to) const {
#pragma unroll
    for (int n = 0; n < kValueParts; ++n) {
      to[n] = *reinterpret_cast<const float2*>(row + n * 8 + lane_ % 4 * 2);
    }
  }

  // Merges the finished tile into the carry. Rows that saw no key of the block are not written, except to the
  // rounded result; in kArena all are, to one of the two.
  __device__ void Store() {
    const ForwardTileIndex at = barriers_.work[finished_.work].at;
    [[maybe_unused]] const ForwardPart part = barriers_.work[finished_.work].part;
    WarpArrives(SharedAddress(&barriers_.work_empty[finished_.work]));
    if constexpr (kMode == ForwardMode::kCarry) {
      CopyAsyncWait<0>();
      __syncwarp();
    }
    Merge<1>(at, part);
    Merge<0>(at, part);
    const bool unfinished = kMode == ForwardMode::kArena && part.unfinished();
    if (arguments_.result.data != nullptr && !unfinished) StoreResult(at);
    if constexpr (kMode == ForwardMode::kArena) {
      if (!unfinished) return;
      NamedBarrier(kGroupBarrier + group_, 128);  // all rows are stored
      if (threadIdx.x % 128 == 0) PutBack<Tile>(arguments_, at);
    }
  }

  template <int kHalf>
  __device__ void Merge(const ForwardTileIndex& at, ForwardPart part) {
    const bool inside = Row(at, kHalf) < arguments_.q_rows;
    float carried = -kInfinity;
    float2 before[kValueParts] = {};
    if constexpr (kMode == ForwardMode::kCarry) {
      carried = carried_[kHalf];
      if constexpr (kStaged<kHalf>) {
        LoadRow(reinterpret_cast<const float*>(StagedRow<kHalf>(lane_ / 4)), before);
      } else if constexpr (kHalf == 0) {
#pragma unroll
        for (int n = 0; n < kValueParts; ++n) before[n] = ahead_[n];
      } else if (inside) {
        LoadRow(RowOf(arguments_.out, at, Row(at, kHalf)), before);
      }
    } else if (kMode == ForwardMode::kArena && part.carried() && inside) {
      carried = arguments_.lse[StatIndex(at, kHalf)] * kLog2E;
      LoadRow(RowOf(arguments_.out, at, Row(at, kHalf)), before);
    }
    if (carried == -kInfinity) {  // what was loaded may be anything
#pragma unroll
      for (int n = 0; n < kValueParts; ++n) before[n] = {0, 0};
    }
    const float max = fmaxf(finished_.reference[kHalf], carried), base = max == -kInfinity ? 0 : max;
    const float sum = QuadSum(finished_.sum[kHalf]);
    float weight = Exp2(finished_.reference[kHalf] - base), carried_weight = Exp2(carried - base);
    const float total = fmaf(sum, weight, carried_weight);
    const float inverse = total == 0 ? 0 : 1 / total;
    weight *= inverse;
    carried_weight *= inverse;
#pragma unroll
    for (int n = 0; n < kValueParts; ++n) {
      acc_[n][2 * kHalf] = fmaf(before[n].x, carried_weight, acc_[n][2 * kHalf] * weight);
      acc_[n][2 * kHalf + 1] = fmaf(before[n].y, carried_weight, acc_[n][2 * kHalf + 1] * weight);
    }
    if (!inside || (kMode == ForwardMode::kCarry && sum == 0)) return;
    if (kMode == ForwardMode::kCarry ||
        (kMode == ForwardMode::kArena && (part.unfinished() || arguments_.result.data == nullptr))) {
      float* const out = RowOf(arguments_.out, at, Row(at, kHalf)) + lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kValueParts; ++n) {
        *reinterpret_cast<float2*>(out + n * 8) = {acc_[n][2 * kHalf], acc_[n][2 * kHalf + 1]};
      }
    }
    if (lane_ % 4 == 0) arguments_.lse[StatIndex(at, kHalf)] = (max + log2f(total)) * kLn2;
  }

  // Neighbouring lanes swap columns, so that each stores 8 bytes side by side and four 32.
  __device__ void StoreResult(const ForwardTileIndex& at) {
    const bool odd = lane_ % 2 == 1;
    const int column = (odd ? 8 : 0) + (lane_ & 2) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = Row(at, half) < arguments_.q_rows;
      __nv_bfloat16* const to = RowOf(arguments_.result, at, Row(at, half)) + column;
#pragma unroll
      for (int n = 0; n < kValueParts; n += 2) {
        const uint32_t left = PackBf16(acc_[n][2 * half], acc_[n][2 * half + 1]),
                       right = PackBf16(acc_[n + 1][2 * half], acc_[n + 1][2 * half + 1]);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
        const uint2 both = odd ? uint2{other, right} : uint2{left, other};
        if (inside) *reinterpret_cast<uint2*>(to + n * 8) = both;
      }
    }
  }

  // Of the work that was taken last.
  __device__ int WorkStage() const { return (work_place_.stage + kForwardWorks - 1) % kForwardWorks; }
  __device__ int Row(const ForwardTileIndex& at, int half) const {
    return at.query_tile * Tile::kQueries + row_ + half * 8;
  }
  __device__ KeyRows Range(int half) const {
    const ForwardTileIndex& at = work_.at;
    const int table = (kMode == ForwardMode::kArena ? work_.part.chunk() * arguments_.batch : 0) + at.item;
    const int64_t tile = table * int64_t{arguments_.order.query_tiles} + at.query_tile;
    return arguments_.tables.ranges[tile * Tile::kQueries + row_ + half * 8];
  }
  __device__ int64_t StatIndex(const ForwardTileIndex& at, int half) const {
    const int64_t row = Row(at, half);
    return (row * arguments_.batch + at.item) * arguments_.order.heads + at.head;
  }
  template <typename T>
  __device__ static T* RowOf(const CudaHeads<T>& out, const ForwardTileIndex& at, int row) {
    return out.data + row * out.row_stride + at.item * out.batch_stride + at.head * Tile::kValueDim;
  }

  const Arguments& arguments_;
  const ForwardShared<Tile>& shared_;
  ForwardBarriers<Tile>& barriers_;
  const int group_, lane_, row_;  // row_: in the tile, of the first half
  RingPlace<Tile::kQueryStages> q_place_;
  RingPlace<Tile::kStages> k_place_, v_place_;
  RingPlace<kForwardWorks> work_place_;
  ForwardWork work_;  // the tile at work
  int key_;           // the first of the key tile
  KeyRows ranges_[2];
  // The tile whose last values are not multiplied yet.
  struct {
    int work;
    float reference[2], sum[2];
  } finished_;
  float acc_[kValueParts][4], scores_[kScoreParts][4];
  uint32_t weights_[Tile::kKeys / 16][4];
  float reference_[2], sum_[2], correction_[2];
  bool changed_, ready_;
  // The carry of the finished tile: in units of log2, and rows that are not staged.
  float carried_[2];
  float2 ahead_[Tile::kStagedHalves < 2 ? kValueParts : 1];
};

template <typename Tile>
__device__ void InitForwardBarriers(ForwardBarriers<Tile>& barriers) {
  const auto init = [](const auto& ring, int count) {
    for (const uint64_t& barrier : ring) PhaseBarrierInit(SharedAddress(&barrier), count);
  };
  init(barriers.q_full, 1);
  init(barriers.q_empty, Tile::kGroups * 4);
  init(barriers.k_full, 1);
  init(barriers.k_empty, Tile::kGroups * 4);
  init(barriers.v_full, 1);
  init(barriers.v_empty, Tile::kGroups * 4);
  init(barriers.work_full, 1);
  init(barriers.work_empty, Tile::kGroups * 4);
  PhaseBarrierFence();
}

template <typename Tile, ForwardMode kMode, typename Arguments>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    AttentionForwardHopper(const __grid_constant__ Arguments arguments) {
  if constexpr (kHopper) {
    unsigned char* const memory = DynamicShared();
    auto& barriers = *reinterpret_cast<ForwardBarriers<Tile>*>(memory + kForwardBarriersAt<Tile, kMode>);
    const uint32_t q = SharedAddress(memory), k = q + Tile::kQueryStages * Tile::Q::kBytes;
    const ForwardShared<Tile> shared{q, k, k + Tile::kStages * Tile::K::kBytes, memory + Tile::kTileBytes,
                                     barriers};
    if (threadIdx.x == 0) InitForwardBarriers<Tile>(barriers);
    __syncthreads();
    WaitForPredecessor();
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
    if (group == 0) {
      ShrinkRegisters<Tile::kLoaderRegisters>();
      if (threadIdx.x < 32 && ElectLane()) ForwardLoader<Tile, kMode>(arguments, shared).Run();
    } else {
      GrowRegisters<Tile::kMathRegisters>();
      ForwardGroup<Tile, kMode, Arguments>(arguments, shared, group - 1).Run();
    }
  }
}

}  // namespace annulus::kernels
