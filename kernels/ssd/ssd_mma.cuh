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

// A document's start decays by 2^-kReset, 0 in f32, and no row by more: so sums over a chunk keep their
// precision.
inline constexpr float kReset = 128;
// A state that has decayed by more is left out.
inline constexpr float kNegligible = 0x1p-40f;

// Which of the CTA's warpgroups this is, in a way that lets the compiler know that a warp agrees on it.
__device__ inline int Warpgroup() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0); }

// x, computed anew wherever this is called: what follows from it does not stay in registers across a loop.
__device__ inline int Again(int x) {
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
  const int64_t first = begin + (chunk - begin) / mma.super_chunks * mma.super_chunks;
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
  // Base 2.
  __device__ float LogDecay() const { return age == 0 ? -kReset : fmaxf(a * kLog2E, -kReset); }
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
      sum[i] = own += gates[i].LogDecay();
      dt[i] = gates[i].dt;
    }
    const float before = WarpPrefixSum(own) - own;
    const int to = h * kSsdRows + lane * 4;
    *reinterpret_cast<float4*>(sums + to) = {before + sum[0], before + sum[1], before + sum[2],
                                             before + sum[3]};
    *reinterpret_cast<float4*>(dts + to) = {dt[0], dt[1], dt[2], dt[3]};
  }
}

// Starts copies of columns [column, column + kColumns) of a chunk's rows, by 256 threads of which this is
// `thread`; zeros past the chunk.
template <int kColumns>
__device__ void LoadRows(uint32_t tile, const StridedRows<const Bf16>& x, const ChunkRows& rows, int64_t item,
                         int64_t column, int thread) {
  using Tile = SharedTile<kSsdRows, kColumns>;
  constexpr int kStep = kSsdThreads / 8;
  const int row = thread / 8, chunk = thread % 8, count = static_cast<int>(rows.end - rows.begin);
  const Bf16* from = x.data + (rows.begin + row) * x.row_stride + item * x.batch_stride + column + chunk * 8;
  const uint32_t to = tile + Tile::Offset(row, chunk);
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

// A state: what its super's chunks leave and, decayed by `factor`, what was at the super's start (end in
// backward). Either may be left out, not both.
struct StateSource {
  const char* own = nullptr;
  const char* super = nullptr;
  float factor = 0;
};
template <int kState, Flow kFlow>
__device__ StateSource StateOf(const MmaSsd& mma, float* states, int64_t chunk, const SuperChunks& super,
                               int64_t unit, float factor) {
  const int64_t far = kFlow == Flow::kForward ? super.first : super.last;
  const char* at_far = SlotAt<kState>(states, mma, far, unit);
  if (chunk == far) return {nullptr, at_far, 1};
  return {SlotAt<kState>(states, mma, chunk, unit), factor > 0 ? at_far : nullptr, factor};
}

// A state on its way to shared memory, by 256 threads of which this is `thread`. Each handles the same
// 16-byte chunks from StartCopy and StartSuper, which do not wait, to Finish, which the thread calls behind
// its own CopyAsyncWait.
template <int kState>
struct StateLoad {
  static constexpr int kChunks = kState * kSsdColumns / 8 / kSsdThreads;
  uint4 super[kChunks];
  float factor = 0;  // 0: nothing to add

  __device__ static int Row(int i, int thread) { return thread / 8 + i * (kSsdThreads / 8); }
  __device__ static int Offset(int i, int thread) {
    return static_cast<int>(SlotRow(Row(i, thread))) + thread % 8 * 16;
  }
  __device__ static uint32_t At(uint32_t tile, int i, int thread) {
    return tile + StateTile<kState>::Offset(Row(i, thread), thread % 8);
  }
  __device__ static void StartCopy(uint32_t tile, const StateSource& from, int thread) {
    const char* copied = from.own != nullptr ? from.own : from.super;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) CopyAsync16(At(tile, i, thread), copied + Offset(i, thread));
  }
  __device__ void StartSuper(const StateSource& from, int thread) {
    factor = from.own != nullptr && from.super != nullptr ? from.factor : 0;
    if (factor == 0) return;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      super[i] = __ldcg(reinterpret_cast<const uint4*>(from.super + Offset(i, thread)));
    }
  }
  __device__ void Finish(uint32_t tile, int thread) {
    if (factor == 0) return;
    uint4 own[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) own[i] = LoadShared16(At(tile, i, thread));
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float2 x = Combine(own[i].x, factor, super[i].x), y = Combine(own[i].y, factor, super[i].y);
      const float2 z = Combine(own[i].z, factor, super[i].z), w = Combine(own[i].w, factor, super[i].w);
      StoreShared16(At(tile, i, thread),
                    {PackBf16(x.x, x.y), PackBf16(y.x, y.y), PackBf16(z.x, z.y), PackBf16(w.x, w.y)});
    }
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

// Heads of a group that one CTA takes, unit after unit. What they have in common is computed again in each
// part of a group.
inline constexpr int kSsdMostHeads = 16;
inline int GroupParts(const MmaSsd& mma) {
  return static_cast<int>(CeilDiv(mma.ssd.heads / mma.ssd.groups, kSsdMostHeads));
}
struct GroupUnits {
  int64_t item, group;
  int64_t first_head, first;  // of the item's heads and units
  int heads, count;           // units
  int part;

  // index: of [batch, groups, parts]
  __device__ GroupUnits(const MmaSsd& mma, int64_t index, int parts) {
    const int64_t of_group = mma.ssd.heads / mma.ssd.groups;
    part = static_cast<int>(index % parts);
    group = index / parts % mma.ssd.groups;
    item = index / parts / mma.ssd.groups;
    const int64_t begin = of_group * part / parts, end = of_group * (part + 1) / parts;
    first_head = group * of_group + begin;
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
