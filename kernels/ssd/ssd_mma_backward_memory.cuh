#pragma once

// Parts of ssd_mma_backward.cuh: the shared memory of its CTAs, what a piece of a product leads to, and what
// becomes of the gradients of gates.

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

// Bytes of shared memory.
//   b | stages of the first pass: x, dy, G | products | dx~ through the state | gates and sums of rows
//       c until products are there (second stage); later c, then stages of the second pass: dy, h
//                                  later dS^T |        later `starts`
template <int kState>
struct BackwardMemory {
  static constexpr int kKeys = KeyTile<kState>::kBytes, kValues = ValueTile::kBytes;
  static constexpr int kStateBytes = StateTile<kState>::kBytes;
  static constexpr int kStage = 2 * kValues + kStateBytes;
  static constexpr int kB = 0;
  static constexpr int kStages = kB + kKeys;
  static constexpr int kFirstC = kStages + kStage;
  static constexpr int kC = kStages;
  static constexpr int kSecondStage = kValues + kStateBytes;
  static constexpr int kSecondStages = kC + kKeys;                             // two of the three
  static constexpr int kProducts = kStages + 2 * kStage;                       // [pieces, 256] float2
  static constexpr int kThroughState = kProducts + kPieces * kSsdThreads * 8;  // [8, 256] float4
  static constexpr int kStateEnergies = kThroughState + 8 * kSsdThreads * 16;  // [256] float2
  static constexpr int kArray = kBackwardMostHeads * kSsdRows * 4;             // [heads, rows]
  static constexpr int kSums = kStateEnergies + kSsdThreads * 8;
  static constexpr int kDts = kSums + kArray;
  static constexpr int kEnds = kDts + kArray;                                 // ddt
  static constexpr int kColumns = kEnds + kArray;                             // r
  static constexpr int kSkips = kColumns + kArray;                            // [8 warps, heads]
  static constexpr int kThrough = kSkips + 8 * kBackwardMostHeads * 4;        // [16 warps, heads]
  static constexpr int kFactors = kThrough + 16 * kBackwardMostHeads * 4;     // [2, heads]: of h, of G
  static constexpr int kWarpColumns = kFactors + 2 * kBackwardMostHeads * 4;  // [8 warps, rows]
  static constexpr int kSlots = kWarpColumns + 8 * kSsdRows * 4;              // StateSlots of h and of G
  static constexpr int kBytes = kSlots + 2 * static_cast<int>(sizeof(StateSlots));
  // What rows get from the state before, of each half of its columns: [2, heads, rows].
  static constexpr int kStarts = kThroughState;
  // Of the second pass, in the order in which they are first used: dy and h, and G.
  __device__ static constexpr int SecondStage(int stage) {
    return stage < 2 ? kSecondStages + stage * kSecondStage : kProducts;
  }
  __device__ static constexpr int SecondGradient(int stage) {
    return stage == 0 ? kStarts + 2 * kArray : kB + (stage - 1) * kStateBytes;
  }
  static_assert(kFirstC + kKeys <= kProducts && kSecondStages + 2 * kSecondStage <= kProducts);
  static_assert(KeyTile<128>::kBytes <= kThroughState - kProducts &&
                kSecondStage <= kThroughState - kProducts);
  static_assert(2 * kArray + kStateBytes <= kSums - kThroughState && 2 * kStateBytes <= kKeys);
  static_assert(kBytes + kSharedSlack <= 227 * 1024);
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
  // Heads of a row lie side by side.
  __device__ void Store(const CudaSsdGradients<Bf16>& out) const {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    const int count = static_cast<int>(rows.end - rows.begin) * units.heads;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kBackwardThreads) {
      const int row = i / units.heads, h = i % units.heads;
      const int64_t token = (rows.begin + row) * ssd.batch + units.item;
      const int64_t gate = token * ssd.heads + units.first_head + h;
      out.da[gate] = ssd.ages[token] == 0 ? 0 : Floats(Memory::kStarts)[h * kSsdRows + row];
      if (out.ddt != nullptr) out.ddt[gate] = Floats(Memory::kEnds)[h * kSsdRows + row];
    }
  }
};

}  // namespace annulus::kernels
