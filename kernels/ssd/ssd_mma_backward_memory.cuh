#pragma once

// Parts of ssd_mma_backward.cuh: the shared memory of its CTAs, what single pieces of a product lead to, and
// what becomes of the gradients of gates.

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {

inline constexpr int kBackwardThreads = 2 * kSsdThreads;
inline constexpr int kBackwardMostHeads = 12;  // as many as shared memory holds the gates of

// Where the gradients of parts of a group go until they are added: [parts, rows, batch, groups, state] f32.
struct PartialGradients {
  int parts = 1;  // 1: written at once
  float* db = nullptr;
  float* dc = nullptr;
};

// What a CTA works on.
struct CtaPlace {
  struct Values {
    const Bf16* data;
    int64_t row_stride;
    // Starts copies of 16 bytes of kCount rows of unit u by this of the threads that share it: row `first` to
    // `to`, and so on, step rows and kPlaces places of the tile on; zeros from row `count` on.
    template <int kCount, int kPlaces>
    __device__ void Load(uint32_t to, uint32_t thread, int u, int first, int step, int count) const {
      const int64_t stride = row_stride;  // read before the copies, not between them
      const Bf16* from = data + first * stride + u * kSsdColumns + thread % 8 * 8;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        CopyAsync16(to + static_cast<uint32_t>(i * kPlaces * 128), from + i * step * stride,
                    first + i * step < count);
      }
    }
  };
  GroupUnits units;
  ChunkRows rows;
  Values x, dy;  // the chunk's rows of the CTA's units
  SuperChunks super;
};

// Phase barriers at which all threads of one pair of warpgroups arrive and for which the other waits, a phase
// a unit. (Barriers at which threads arrive without waiting would do; racecheck of compute-sanitizer then
// loses the order that later barriers of the block give.)
class UnitPhases {
 public:
  // Of units, one of two in turns: the second pair may come to a unit before the first has come to the one
  // before.
  enum Phase { kUnitIsThere = 0, kInsideIsThere = 2, kInsideIsRead = 3, kCount = 4 };

  // barriers: [kCount] in shared memory
  __device__ explicit UnitPhases(uint32_t barriers) : barriers_(barriers) {}

  __device__ void Init() const {
    for (int phase = 0; phase < kCount; ++phase) PhaseBarrierInit(At(phase), kSsdThreads);
  }
  __device__ void Arrive(int phase) const { PhaseBarrierArrive(At(phase)); }
  // before: phases of this barrier
  __device__ void Wait(int phase, int before) const {
    PhaseBarrierWait(At(phase), static_cast<uint32_t>(before % 2));
  }

 private:
  __device__ uint32_t At(int phase) const { return barriers_ + static_cast<uint32_t>(phase) * 8; }
  const uint32_t barriers_;
};

// Bytes of shared memory.
//   b | stages of the first pass: x, dy, G | products | dx~ inside the chunk | gates and sums of rows
//       c until products are there (second unit); c again (while the last unit is in the second stage),
//       then stages of the second pass: dy, h
//                                  later dS^T |        later `starts`
template <int kState>
struct BackwardMemory {
  static constexpr int kKeys = KeyTile<kState>::kBytes, kValues = ValueTile::kBytes;
  static constexpr int kStateBytes = StateTile<kState>::kBytes;
  static constexpr int kStage = 2 * kValues + kStateBytes;
  static constexpr int kB = 0;
  static constexpr int kStages = kB + kKeys;
  static constexpr int kC = kStages;
  static constexpr int kSecondStage = kValues + kStateBytes;
  static constexpr int kSecondStages = kC + kKeys;                        // two of the three
  static constexpr int kProducts = kStages + 2 * kStage;                  // [pieces, 256] float2
  static constexpr int kInside = kProducts + kPieces * kSsdThreads * 8;   // [8, 256] float4
  static constexpr int kInsideEnergies = kInside + 8 * kSsdThreads * 16;  // [256] float2
  static constexpr int kArray = kBackwardMostHeads * kSsdRows * 4;        // [heads, rows]
  static constexpr int kSums = kInsideEnergies + kSsdThreads * 8;
  static constexpr int kDts = kSums + kArray;
  static constexpr int kEnds = kDts + kArray;                                 // ddt
  static constexpr int kColumns = kEnds + kArray;                             // r
  static constexpr int kSkips = kColumns + kArray;                            // [8 warps, heads]
  static constexpr int kThrough = kSkips + 8 * kBackwardMostHeads * 4;        // [16 warps, heads]
  static constexpr int kFactors = kThrough + 16 * kBackwardMostHeads * 4;     // [3, heads]: of h, of G, skips
  static constexpr int kWarpColumns = kFactors + 3 * kBackwardMostHeads * 4;  // [8 warps, rows]
  static constexpr int kSlots = kWarpColumns + 8 * kSsdRows * 4;              // StateSlots of h and of G
  static constexpr int kPlace = kSlots + 2 * static_cast<int>(sizeof(StateSlots));
  static constexpr int kPhases = kPlace + static_cast<int>(sizeof(CtaPlace));
  static constexpr int kBytes = kPhases + UnitPhases::kCount * 8;
  // What rows get from the state before, of each half of its columns: [2, heads, rows].
  static constexpr int kStarts = kInside;
  // Of the second pass, in the order in which they are first used: dy and h, and G.
  __device__ static constexpr int SecondStage(int stage) {
    return stage < 2 ? kSecondStages + stage * kSecondStage : kProducts;
  }
  __device__ static constexpr int SecondGradient(int stage) {
    return stage == 0 ? kStarts + 2 * kArray : kB + (stage - 1) * kStateBytes;
  }
  static_assert(kKeys <= kStage && kSecondStages + 2 * kSecondStage <= kProducts);
  static_assert(KeyTile<128>::kBytes <= kInside - kProducts && kSecondStage <= kInside - kProducts);
  static_assert(2 * kArray + kStateBytes <= kSums - kInside && 2 * kStateBytes <= kKeys);
  static_assert(kPhases % 8 == 0 && kBytes + kSharedSlack <= 227 * 1024);
};

// What this lane's two rows s bring along and gather.
struct RowPair {
  float sum[2], dt[2];
  float energy[2] = {0, 0};
  float skip = 0;
};

// What one piece of X dY^T leads to: the weights of dY, and what is summed over rows.
struct Piece {
  uint32_t weights;
  float energy;  // of the row
  float columns[2];
};
// to: logarithms of columns, s: of S^T.   first: columns of the lane before it weigh nothing
__device__ inline Piece WeighPiece(const float (&gradient)[2], float2 to, float2 s, float sum, float dt,
                                   int first, float (&ds)[2]) {
  float decay[2] = {Exp2(to.x - sum), Exp2(to.y - sum)};
  if (first > 0) decay[0] = 0;
  if (first > 1) decay[1] = 0;
  const float weight[2] = {s.x * decay[0], s.y * decay[1]};
  const float of_dt[2] = {gradient[0] * dt, gradient[1] * dt};
  ds[0] = fmaf(of_dt[0], decay[0], ds[0]);
  ds[1] = fmaf(of_dt[1], decay[1], ds[1]);
  return {PackBf16(weight[0], weight[1]),
          gradient[0] * weight[0] + gradient[1] * weight[1],
          {of_dt[0] * weight[0], of_dt[1] * weight[1]}};
}

// Sums over the warp's rows of columns [t, t + 16) and of their mirror images [112 - t, 128 - t): of two
// halves, of two blocks, of two columns each lane keeps one and passes on the other.
__device__ inline void StoreColumns(const float (&columns)[2][2][2], int t, float* to) {
  const int lane = static_cast<int>(Again(threadIdx.x) % 32);
  const bool far = lane & 16, second = lane & 8, odd = lane & 4;
  float half[2][2], block[2];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      half[b][c] = (far ? columns[1][b][c] : columns[0][b][c]) +
                   __shfl_xor_sync(~0u, far ? columns[0][b][c] : columns[1][b][c], 16);
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    block[c] = (second ? half[1][c] : half[0][c]) + __shfl_xor_sync(~0u, second ? half[0][c] : half[1][c], 8);
  }
  const float sum = (odd ? block[1] : block[0]) + __shfl_xor_sync(~0u, odd ? block[0] : block[1], 4);
  const int column = (far ? 112 - t : t) + (second ? 8 : 0) + lane % 4 * 2 + (odd ? 1 : 0);
  to[column] = sum;
}

// What the units left in shared memory, as gradients of gates.
template <typename Memory>
struct GateGradients {
  const MmaSsd& mma;
  const GroupUnits& units;
  const ChunkRows& rows;
  int64_t chunk;
  char* shared;

  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }

  // da in the place of the first half's `starts`, and the chunk's part of dskip. A warp takes a head, a lane
  // four rows.
  __device__ void Sum(float* dskip) const {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    for (int h = thread / 32; h < units.heads; h += kBackwardThreads / 32) {
      float through = 0, skip = 0;
      for (int warp = 0; warp < 16; ++warp)
        through += Floats(Memory::kThrough)[warp * kBackwardMostHeads + h];
      for (int warp = 0; warp < 8; ++warp) skip += Floats(Memory::kSkips)[warp * kBackwardMostHeads + h];
      through *= Exp2(Floats(Memory::kSums)[h * kSsdRows + kSsdRows - 1]);
      if (dskip != nullptr && lane == 0) {
        dskip[(chunk * ssd.batch + units.item) * ssd.heads + units.first_head + h] = skip;
      }
      float before[4], later[4], sum_before = 0, sum_later = 0;
      float* starts = Floats(Memory::kStarts) + h * kSsdRows + lane * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = h * kSsdRows + lane * 4 + i;
        before[i] = sum_before;
        sum_before += Floats(Memory::kDts)[at] * Floats(Memory::kEnds)[at] - Floats(Memory::kColumns)[at];
      }
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        sum_later += starts[i] + starts[Memory::kArray / 4 + i];
        later[i] = sum_later;
      }
      const float of_before = WarpPrefixSum(sum_before) - sum_before;
      const float of_later = WarpSuffixSum(sum_later) - sum_later;
#pragma unroll
      for (int i = 0; i < 4; ++i) starts[i] = through + (of_before + before[i]) + (of_later + later[i]);
    }
  }
  // Heads of a row lie side by side. Which rows start a document, where da is 0, can be seen from how much
  // they decay.
  __device__ void Store(const CudaSsdGradients<Bf16>& out) const {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    static_assert(-kReset < 2 * kLogNegligible);
    const float* sums = Floats(Memory::kSums);  // of any head
    const int count = static_cast<int>(rows.end - rows.begin) * units.heads;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kBackwardThreads) {
      const int row = i / units.heads, h = i % units.heads;
      const int64_t token = (rows.begin + row) * ssd.batch + units.item;
      const int64_t gate = token * ssd.heads + units.first_head + h;
      const bool starts = sums[row] - (row > 0 ? sums[row - 1] : 0) < -kReset / 2;
      out.da[gate] = starts ? 0 : Floats(Memory::kStarts)[h * kSsdRows + row];
      if (out.ddt != nullptr) out.ddt[gate] = Floats(Memory::kEnds)[h * kSsdRows + row];
    }
  }
};

}  // namespace annulus::kernels
