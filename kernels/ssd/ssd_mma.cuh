#pragma once

// What the kernels of ssd_mma.h share. A column block of 64 columns of a head is a unit of its own here: it
// has the head's decays and its own slots.

#include "kernels/common/vector.cuh"
#include "kernels/common/wgmma.cuh"
#include "kernels/ssd/ssd_mma.h"

namespace annulus::kernels {

using Bf16 = __nv_bfloat16;

inline constexpr int kSsdRows = 128;     // of a chunk
inline constexpr int kSsdColumns = 64;   // of a unit
inline constexpr int kSsdThreads = 256;  // two warpgroups: what works on a unit

using ValueTile = SharedTile<kSsdRows, kSsdColumns>;
template <int kState>
using KeyTile = SharedTile<kSsdRows, kState>;
template <int kState>
using StateTile = SharedTile<kState, kSsdColumns>;

// A document's start decays by 2^-kReset, 0 in f32.
inline constexpr float kReset = 128;
// A state that has decayed by more is left out, and no row inside a document decays by more: so the sums over
// a chunk, of which differences are taken, keep their precision.
inline constexpr float kNegligible = 0x1p-40f, kLogNegligible = -40;

// Which of the CTA's warpgroups this is, in a way that lets the compiler know that a warp agrees on it.
__device__ inline int Warpgroup() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0); }

// x, computed anew wherever this is called: what follows from it does not stay in registers across a loop.
__device__ inline uint32_t Again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

struct MmaSsd {
  CudaSsd<Bf16> ssd;
  SegmentTable supers;       // as chunks of more rows
  int64_t super_chunks = 1;  // of all but a segment's last
  int blocks = 1;            // units of a head

  int64_t units() const { return ssd.all_heads() * blocks; }
  int64_t group_units() const { return ssd.heads / ssd.groups * blocks; }
};
MmaSsd MakeMmaSsd(const CudaSsd<Bf16>& ssd);

struct SuperChunks {
  int64_t first, last;
};
__device__ inline SuperChunks SuperOf(const MmaSsd& mma, int64_t chunk, int segment) {
  const int64_t begin = mma.ssd.chunks.first_chunk[segment], end = mma.ssd.chunks.first_chunk[segment + 1];
  // Both fit 32 bits, whose division takes a quarter of the time.
  const auto length = static_cast<uint32_t>(mma.super_chunks);
  const int64_t first = begin + static_cast<uint32_t>(chunk - begin) / length * length;
  return {first, min(first + mma.super_chunks, end) - 1};
}

// Slots are read and written in pieces of 4 KiB, 16 rows of f32: bf16 rows fill the first half of a piece, so
// that the scan over supers can replace f32 by bf16 in place.
inline constexpr int kPieceBytes = 4096, kPieceRows = 16;
template <int kState>
__device__ char* SlotAt(float* states, const MmaSsd& mma, int64_t chunk, int64_t unit) {
  const int64_t units = mma.ssd.batch * mma.ssd.heads * mma.blocks;
  return reinterpret_cast<char*>(states + (chunk * units + unit) * kState * kSsdColumns);
}
__device__ inline int64_t SlotRow(int row) {
  return int64_t{row / kPieceRows} * kPieceBytes + row % kPieceRows * (kSsdColumns * 2);
}

// What a row's gates come from, as loaded; LogDecay and dt say what they mean. Rows past the chunk change
// nothing and give nothing.
struct RowGates {
  int age = 1;
  float a = 0, dt = 0;
  // Base 2, at least `least` inside a document.
  __device__ float LogDecay(float least) const { return age == 0 ? -kReset : fmaxf(a * kLog2E, least); }
};
__device__ inline RowGates LoadGates(const CudaSsd<Bf16>& ssd, int64_t begin, int64_t end, int64_t item,
                                     int64_t head, int row) {
  if (begin + row >= end) return {};
  const int64_t token = (begin + row) * ssd.batch + item, gate = token * ssd.heads + head;
  return {ssd.ages[token], ssd.a[gate], ssd.dt != nullptr ? ssd.dt[gate] : 1.0f};
}

__device__ inline float WarpPrefixSum(float x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(~0u, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

__device__ inline float WarpSuffixSum(float x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float after = __shfl_down_sync(~0u, x, offset);
    if (lane + offset < 32) x += after;
  }
  return x;
}

// sums[h][row] = sum of logarithms up to and with the row, dts[h][row], of heads [head, head + count).
//   sums, dts: [count, kSsdRows] in shared memory
__device__ inline void FillGates(const CudaSsd<Bf16>& ssd, const ChunkRows& rows, int64_t item, int64_t head,
                                 int count, float* sums, float* dts) {
  const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
  for (int h = static_cast<int>(threadIdx.x / 32); h < count; h += warps) {
    RowGates gates[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gates[i] = LoadGates(ssd, rows.begin, rows.end, item, head + h, lane * 4 + i);
    }
    float sum[4], dt[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] = own += gates[i].LogDecay(kLogNegligible);
      dt[i] = gates[i].dt;
    }
    const float before = WarpPrefixSum(own) - own;
    const int to = h * kSsdRows + lane * 4;
    *reinterpret_cast<float4*>(sums + to) = {before + sum[0], before + sum[1], before + sum[2],
                                             before + sum[3]};
    *reinterpret_cast<float4*>(dts + to) = {dt[0], dt[1], dt[2], dt[3]};
  }
}

// Where a thread's first row goes in a tile to which threads bring 16 bytes each, eight a row.
__device__ inline uint32_t CopyAt(uint32_t tile, uint32_t thread) {
  return tile + thread / 8 * 128 + ((thread ^ thread / 8) % 8) * 16;
}

// Starts copies of columns [column, column + kColumns) of a chunk's rows, by kThreads threads of which this
// is `thread`; zeros past the chunk.
template <int kColumns, int kThreads = kSsdThreads>
__device__ void LoadRows(uint32_t tile, const StridedRows<const Bf16>& x, const ChunkRows& rows, int64_t item,
                         int64_t column, uint32_t thread) {
  using Tile = SharedTile<kSsdRows, kColumns>;
  constexpr int kStep = kThreads / 8;
  const int row = static_cast<int>(thread / 8), count = static_cast<int>(rows.end - rows.begin);
  const Bf16* from =
      x.data + (rows.begin + row) * x.row_stride + item * x.batch_stride + column + thread % 8 * 8;
  const uint32_t to = CopyAt(tile, thread);
#pragma unroll
  for (int pass = 0; pass < kSsdRows / kStep; ++pass) {
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      CopyAsync16(to + static_cast<uint32_t>(pass * kStep * 128 + panel * Tile::kPanelBytes),
                  from + panel * 64, row + pass * kStep < count);
    }
    from += kStep * x.row_stride;
  }
}

// Copies of a tile of 64 columns that a thread starts for unit after unit: 16 bytes of some of the rows.
struct RowCopies {
  const Bf16* from;  // of the first row, of unit 0
  uint32_t inside;   // bit i: whether row i is in the chunk

  // first: row of the chunk, row_step: to the next, count: of them
  __device__ RowCopies(const StridedRows<const Bf16>& x, const ChunkRows& rows, int64_t item, int64_t column,
                       int first, int row_step, int count)
      : from(x.data + (rows.begin + first) * x.row_stride + item * x.batch_stride + column), inside(0) {
    for (int i = 0; i < count; ++i) {
      inside |= (rows.begin + first + i * row_step < rows.end ? 1u : 0u) << i;
    }
  }
  // to: where the first row goes; the next ones kStep rows on.   step: in elements from row to row
  template <int kCount, int kStep>
  __device__ void Start(uint32_t to, int64_t step, int u) const {
    const Bf16* row = from + u * kSsdColumns;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      CopyAsync16(to + static_cast<uint32_t>(i * kStep * 128), row, inside >> i & 1);
      row += step;
    }
  }
};

// Folded rows: what is left of a square of rows of a chunk on one side of its diagonal is shared evenly among
// the eight warps of a pair of warpgroups. Warp j has, as rows g and g + 8 of its fragments, the lower rows
// 8 j + g and the upper rows 8 (15 - j) + g, and so 17 of the pieces of 8 x 8 whichever j is. In a tile these
// rows lie at places 16 j + g and 16 j + g + 8.
inline constexpr int kPieces = 17;
__device__ inline int FoldedRow(int place) {
  return (place & 8 ? 120 - place / 16 * 8 : place / 16 * 8) + place % 8;
}
// In rows, from place `thread` / 8 to that 32 on.
__device__ inline int FoldedStep(uint32_t thread) { return thread & 64 ? -16 : 16; }

// Mirrored rows: each 16 rows 16 i ... of the first half lie in front of 112 - 16 i ... of the second.
__device__ inline int MirroredRow(int place) {
  return (place & 16 ? 112 - place / 32 * 16 : place / 32 * 16) + place % 16;
}
__device__ inline int MirroredPlace(int row) {
  return (row < 64 ? row / 16 * 32 : 240 - row / 16 * 32) + row % 16;
}
// As FoldedStep.
__device__ inline int MirroredStep(uint32_t thread) { return thread & 128 ? -16 : 16; }

// LoadRows with the rows folded.
template <int kColumns>
__device__ void LoadFolded(uint32_t tile, const StridedRows<const Bf16>& x, const ChunkRows& rows,
                           int64_t item, int64_t column) {
  const uint32_t thread = threadIdx.x % kSsdThreads;
  const RowCopies copies(x, rows, item, column + thread % 8 * 8, FoldedRow(static_cast<int>(thread / 8)),
                         FoldedStep(thread), 4);
#pragma unroll
  for (int panel = 0; panel < kColumns / 64; ++panel) {
    const uint32_t to = tile + static_cast<uint32_t>(panel * SharedTile<kSsdRows, kColumns>::kPanelBytes);
    copies.Start<4, kSsdThreads / 8>(CopyAt(to, thread), FoldedStep(thread) * x.row_stride, panel);
  }
}

__device__ inline uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ inline void StoreShared16(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ inline float2 UnpackBf16(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
// own + factor super, of two bf16 each, in f32
__device__ inline float2 Combine(uint32_t own, float factor, uint32_t super) {
  const float2 a = UnpackBf16(own), b = UnpackBf16(super);
  return {fmaf(factor, b.x, a.x), fmaf(factor, b.y, a.y)};
}

// factors[h]: what is left of the state at the super's start (kBackward: end) at the chunk's, of heads
// [head, head + count); 0 where that is nothing.   decays: those of states, [chunks, batch * heads]
enum class Flow { kForward, kBackward };
template <Flow kFlow>
__device__ void FillFactors(const MmaSsd& mma, const float* decays, int64_t chunk, const SuperChunks& super,
                            int64_t head, int count, float* factors) {
  const int h = static_cast<int>(threadIdx.x);
  if (h >= count) return;
  const float* of_head = decays + head + h;
  const int64_t heads = mma.ssd.batch * mma.ssd.heads;
  float factor = 1;
  if (kFlow == Flow::kForward && chunk != super.first) factor = Exp2(of_head[(chunk - 1) * heads]);
  if (kFlow == Flow::kBackward && chunk != super.last) {
    factor = Exp2(of_head[super.last * heads] - of_head[chunk * heads]);
  }
  factors[h] = factor > kNegligible ? factor : 0;
}

// Where the states of consecutive units lie: what the super's chunks leave of a state and, to be decayed and
// added, what was at the super's start (end in backward). At its first (last) chunk that is all there is:
// both are the same.
struct StateSlots {
  const char *own, *super;
};
// unit: the first, of all
template <int kState, Flow kFlow>
__device__ StateSlots SlotsOf(const MmaSsd& mma, float* states, int64_t chunk, const SuperChunks& supers,
                              int64_t unit) {
  const int64_t far = kFlow == Flow::kForward ? supers.first : supers.last;
  return {SlotAt<kState>(states, mma, chunk, unit), SlotAt<kState>(states, mma, far, unit)};
}

// A state on its way to shared memory, by kThreads threads of which this is `thread`. Each handles the same
// 16-byte chunks from StartCopy and StartSuper, which do not wait, to Finish, which the thread calls behind
// its own CopyAsyncWait.
template <int kState, int kThreads = kSsdThreads>
struct StateLoad {
  static constexpr int kChunks = kState * kSsdColumns / 8 / kThreads;
  static constexpr int kStep = kThreads / 8 / kPieceRows * kPieceBytes;  // between a thread's
  static_assert(kThreads / 8 % kPieceRows == 0);
  uint4 super[kChunks];
  float factor = 0;  // 0: nothing to add

  // The thread's part of unit u's slot, of slots that begin at `slots`.
  __device__ static const char* From(const char* slots, int u, uint32_t thread) {
    const uint32_t row = thread / 8;
    return slots + (static_cast<uint32_t>(u) * (kState * kSsdColumns * 4) + row / kPieceRows * kPieceBytes +
                    row % kPieceRows * (kSsdColumns * 2) + thread % 8 * 16);
  }
  // Rows of one thread are multiples of 8 apart.
  __device__ static uint32_t At(uint32_t tile, int i, uint32_t thread) {
    return CopyAt(tile, thread) + static_cast<uint32_t>(i * (kThreads / 8) * 128);
  }
  __device__ static void StartCopy(uint32_t tile, const StateSlots& slots, int u, uint32_t thread) {
    const char* from = From(slots.own, u, thread);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) CopyAsync16(At(tile, i, thread), from + i * kStep);
  }
  // kept: what is left of the super's state at the chunk
  __device__ void StartSuper(const StateSlots& slots, int u, uint32_t thread, float kept) {
    factor = slots.own != slots.super ? kept : 0;
    if (factor != 0) LoadSuper(slots, u, thread, super);
  }
  __device__ void Finish(uint32_t tile, uint32_t thread) {
    if (factor == 0) return;
    uint4 own[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) own[i] = LoadShared16(At(tile, i, thread));
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      StoreShared16(At(tile, i, thread), Sum(own[i], factor, super[i]));
    }
  }
  // The thread's part of the super's state, to registers.
  __device__ static void LoadSuper(const StateSlots& slots, int u, uint32_t thread, uint4 (&super)[kChunks]) {
    const char* from = From(slots.super, u, thread);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) super[i] = __ldcg(reinterpret_cast<const uint4*>(from + i * kStep));
  }
  // StartSuper and Finish at once, where registers are short. Most heads forget the super's state within a
  // few chunks.
  __device__ static void AddSuper(uint32_t tile, const StateSlots& slots, int u, uint32_t thread,
                                  float kept) {
    if (kept == 0 || slots.own == slots.super) return;
    uint4 super[kChunks];
    LoadSuper(slots, u, thread, super);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      StoreShared16(At(tile, i, thread), Sum(LoadShared16(At(tile, i, thread)), kept, super[i]));
    }
  }

 private:
  // own + factor super, rounded
  __device__ static uint4 Sum(const uint4& own, float factor, const uint4& super) {
    const auto sum = [&](uint32_t a, uint32_t b) {
      const float2 pair = Combine(a, factor, b);
      return PackBf16(pair.x, pair.y);
    };
    return {sum(own.x, super.x), sum(own.y, super.y), sum(own.z, super.z), sum(own.w, super.w)};
  }
};

// Word i of lane t of each four lanes becomes word t of lane i.
__device__ inline void TransposeQuad(uint32_t (&r)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(~0u, odd ? r[0] : r[1], 1),
                 b = __shfl_xor_sync(~0u, odd ? r[2] : r[3], 1);
  r[0] = odd ? a : r[0];
  r[1] = odd ? r[1] : a;
  r[2] = odd ? b : r[2];
  r[3] = odd ? r[3] : b;
  const uint32_t c = __shfl_xor_sync(~0u, high ? r[0] : r[2], 2),
                 d = __shfl_xor_sync(~0u, high ? r[1] : r[3], 2);
  r[0] = high ? c : r[0];
  r[2] = high ? r[2] : c;
  r[1] = high ? d : r[1];
  r[3] = high ? r[3] : d;
}

// Rounds the rows of a C fragment and writes them, 16 bytes a lane. row(0), row(1): where rows g and g + 8
// begin, null: nowhere.
template <int kN, typename Row>
__device__ void StoreFragment(const float (&c)[kN][4], const Row& row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Bf16* to = row(half);
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = PackBf16(c[n + i][2 * half], c[n + i][2 * half + 1]);
      TransposeQuad(words);
      if (to == nullptr) continue;
      *reinterpret_cast<uint4*>(to + (n + static_cast<int>(threadIdx.x % 4)) * 8) = {words[0], words[1],
                                                                                     words[2], words[3]};
    }
  }
}

// c += factor x over the folded rows of warp `warp` and columns from `column` on, a multiple of 16.
//   x: tile whose rows are in kOrder
enum class Order { kPlain, kMirrored };
template <Order kOrder, int kN>
__device__ void AddFolded(uint32_t x, int warp, int column, float factor, float (&c)[kN][4]) {
  const int lane = static_cast<int>(Again(threadIdx.x) % 32);
  const int row = FoldedRow(16 * warp + lane % 16);
  const uint32_t lane_at =
      x + ValueTile::Offset(kOrder == Order::kPlain ? row : MirroredPlace(row), lane / 16);
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    uint32_t values[4];
    LoadMatrices(values, ValueTile::At(lane_at, 0, column / 16 + k));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = UnpackBf16(values[i]);
      float* to = c[2 * k + i / 2] + i % 2 * 2;
      to[0] = fmaf(factor, pair.x, to[0]);
      to[1] = fmaf(factor, pair.y, to[1]);
    }
  }
}

template <int kN>
__device__ void ScaleRows(float (&c)[kN][4], float low, float high) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    c[n][0] *= low;
    c[n][1] *= low;
    c[n][2] *= high;
    c[n][3] *= high;
  }
}

// Heads of a group that one CTA takes, unit after unit: at most kSsdMostHeads, in backward fewer. What they
// have in common is computed again in each part of a group.
inline constexpr int kSsdMostHeads = 16;
inline int GroupParts(const MmaSsd& mma, int most_heads) {
  return static_cast<int>(CeilDiv(mma.ssd.heads / mma.ssd.groups, most_heads));
}
struct GroupUnits {
  int64_t item, group;
  int64_t first_head, first;  // of the item's heads and units
  int heads, count;           // units
  int part;

  // index: of [batch, groups, parts]. All of it fits 32 bits, whose divisions take a quarter of the time.
  __device__ GroupUnits(const MmaSsd& mma, uint32_t index, uint32_t parts) {
    const auto groups = static_cast<uint32_t>(mma.ssd.groups);
    const uint32_t of_group = static_cast<uint32_t>(mma.ssd.heads) / groups, of_item = index / parts;
    part = static_cast<int>(index % parts);
    group = of_item % groups;
    item = of_item / groups;
    const uint32_t begin = of_group * (index % parts) / parts, end = of_group * (index % parts + 1) / parts;
    first_head = of_item % groups * of_group + begin;
    first = first_head * mma.blocks;
    heads = static_cast<int>(end - begin);
    count = static_cast<int>((end - begin) * mma.blocks);
  }
};

// Dynamic shared memory on 1024 bytes; launches ask for kSharedSlack more than the kernel uses.
inline constexpr int kSharedSlack = 1024;
__device__ inline char* SharedBase() {
  extern __shared__ char ssd_shared_memory[];
  return ssd_shared_memory + ((1024 - SharedAddress(ssd_shared_memory) % 1024) % 1024);
}

// fn.operator()<columns of the state>()
template <typename Fn>
cudaError_t VisitState(const CudaSsd<Bf16>& ssd, Fn&& fn) {
  return ssd.state == 64 ? fn.template operator()<64>() : fn.template operator()<128>();
}

template <typename... Parameters, typename... Args>
cudaError_t LaunchSsd(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                      cudaStream_t stream, const Args&... args) {
  if (static_cast<int64_t>(grid.x) * grid.y * grid.z == 0) return cudaSuccess;
  if (grid.y > UINT16_MAX) return cudaErrorInvalidValue;
  shared_bytes += kSharedSlack;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(args...);
  return cudaGetLastError();
}

// State at the start (kBackward: gradient at the end) of each super, in place of the super's own; `initial`
// of each segment, null: 0.
cudaError_t ReplaceSupers(Flow flow, const MmaSsd& mma, const CudaSsdStates& states, const float* initial,
                          cudaStream_t stream);

}  // namespace annulus::kernels
