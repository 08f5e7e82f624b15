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
inline constexpr int kSsdThreads = 256;  // two warpgroups

using ValueTile = SharedTile<kSsdRows, kSsdColumns>;
template <int kState>
using KeyTile = SharedTile<kSsdRows, kState>;
template <int kState>
using StateTile = SharedTile<kState, kSsdColumns>;

// A document's start decays by 2^-kReset: 0 in f32, while sums over a chunk keep their precision.
inline constexpr float kReset = 200;
// A state that has decayed by more is left out.
inline constexpr float kNegligible = 0x1p-40f;

// Which of the CTA's warpgroups this is, in a way that lets the compiler know that a warp agrees on it.
__device__ inline int Warpgroup() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0); }

struct MmaSsd {
  CudaSsd<Bf16> ssd;
  SegmentTable supers;       // as chunks of more rows
  int64_t super_chunks = 1;  // of all but a segment's last
  int64_t blocks = 1;        // units of a head

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

// The logarithm of a row's decay, base 2, and its dt. Rows past the chunk change nothing and give nothing.
struct RowGates {
  float log_decay = 0, dt = 0;
};
__device__ inline RowGates LoadGates(const CudaSsd<Bf16>& ssd, const ChunkRows& rows, int64_t item,
                                     int64_t head, int row) {
  if (rows.begin + row >= rows.end) return {};
  const int64_t token = (rows.begin + row) * ssd.batch + item, gate = token * ssd.heads + head;
  const float log_decay = ssd.ages[token] == 0 ? -kReset : ssd.a[gate] * kLog2E;
  return {log_decay, ssd.dt != nullptr ? ssd.dt[gate] : 1.0f};
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
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int h = static_cast<int>(threadIdx.x / 32); h < count; h += kSsdThreads / 32) {
    float sum[4], dt[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowGates gates = LoadGates(ssd, rows, item, head + h, lane * 4 + i);
      sum[i] = own += gates.log_decay;
      dt[i] = gates.dt;
    }
    const float before = WarpPrefixSum(own) - own;
    const int to = h * kSsdRows + lane * 4;
    *reinterpret_cast<float4*>(sums + to) = {before + sum[0], before + sum[1], before + sum[2],
                                             before + sum[3]};
    *reinterpret_cast<float4*>(dts + to) = {dt[0], dt[1], dt[2], dt[3]};
  }
}

// Columns [0, kColumns) of one head's rows of a chunk.
template <int kColumns>
__device__ void LoadRows(uint32_t tile, const StridedRows<const Bf16>& x, const ChunkRows& rows, int64_t item,
                         int64_t column) {
  SharedTile<kSsdRows, kColumns>::template Load<kSsdThreads>(
      tile, x.data + rows.begin * x.row_stride + item * x.batch_stride + column, x.row_stride, 0,
      static_cast<int>(rows.end - rows.begin));
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

// A state: what its super's chunks leave and, decayed by `factor`, what was at the super's start (end in
// backward). Either may be left out.
struct StateSource {
  const char* own = nullptr;
  const char* super = nullptr;
  float factor = 0;
};
template <int kState>
__device__ StateSource ForwardState(const MmaSsd& mma, const CudaSsdStates& states, int64_t chunk,
                                    const SuperChunks& super, int64_t unit) {
  const char* start = SlotAt<kState>(states.states, mma, super.first, unit);
  if (chunk == super.first) return {nullptr, start, 1};
  const int64_t heads = mma.ssd.batch * mma.ssd.heads;
  const float factor = Exp2(states.decays[(chunk - 1) * heads + unit / mma.blocks]);
  return {SlotAt<kState>(states.states, mma, chunk, unit), factor > kNegligible ? start : nullptr, factor};
}
template <int kState>
__device__ StateSource BackwardState(const MmaSsd& mma, const CudaSsdStates& gradients, int64_t chunk,
                                     const SuperChunks& super, int64_t unit) {
  const char* end = SlotAt<kState>(gradients.states, mma, super.last, unit);
  if (chunk == super.last) return {nullptr, end, 1};
  const int64_t heads = mma.ssd.batch * mma.ssd.heads, head = unit / mma.blocks;
  const float factor =
      Exp2(gradients.decays[super.last * heads + head] - gradients.decays[chunk * heads + head]);
  return {SlotAt<kState>(gradients.states, mma, chunk, unit), factor > kNegligible ? end : nullptr, factor};
}

// A state on its way to shared memory. Each thread handles the same 16-byte chunks from Start, which does not
// wait, to Finish, which the thread calls behind its own CopyAsyncWait.
template <int kState>
struct StateLoad {
  static constexpr int kChunks = kState * kSsdColumns / 8 / kSsdThreads;
  uint4 super[kChunks];
  float factor;
  bool combine;

  __device__ static int Row(int i) { return static_cast<int>(threadIdx.x / 8) + i * (kSsdThreads / 8); }
  __device__ static int64_t Offset(int i) { return SlotRow(Row(i)) + threadIdx.x % 8 * 16; }
  __device__ static uint32_t At(uint32_t tile, int i) {
    return tile + StateTile<kState>::Offset(Row(i), static_cast<int>(threadIdx.x % 8));
  }

  __device__ void Start(uint32_t tile, const StateSource& from) {
    combine = from.own != nullptr && from.super != nullptr;
    factor = from.factor;
    const char* copied = from.own != nullptr ? from.own : from.super;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) CopyAsync16(At(tile, i), copied + Offset(i));
    if (!combine) return;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) super[i] = *reinterpret_cast<const uint4*>(from.super + Offset(i));
  }
  __device__ void Finish(uint32_t tile) {
    if (!combine) return;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 own = LoadShared16(At(tile, i));
      const float2 x = Combine(own.x, factor, super[i].x), y = Combine(own.y, factor, super[i].y);
      const float2 z = Combine(own.z, factor, super[i].z), w = Combine(own.w, factor, super[i].w);
      StoreShared16(At(tile, i),
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
__device__ inline uint32_t SharedBase() {
  extern __shared__ char ssd_shared_memory[];
  return (SharedAddress(ssd_shared_memory) + 1023) & ~1023u;
}
__device__ inline float* SharedFloats(uint32_t address) {
  return reinterpret_cast<float*>(__cvta_shared_to_generic(address));
}

// fn.operator()<columns of the state>()
template <typename Fn>
cudaError_t VisitState(const CudaSsd<Bf16>& ssd, Fn&& fn) {
  return ssd.state == 64 ? fn.template operator()<64>() : fn.template operator()<128>();
}

template <typename... Parameters, typename... Args>
cudaError_t LaunchSsd(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, cudaStream_t stream,
                      const Args&... args) {
  if (static_cast<int64_t>(grid.x) * grid.y * grid.z == 0) return cudaSuccess;
  if (grid.y > UINT16_MAX) return cudaErrorInvalidValue;
  shared_bytes += kSharedSlack;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kSsdThreads, static_cast<size_t>(shared_bytes), stream>>>(args...);
  return cudaGetLastError();
}

enum class Flow { kForward, kBackward };
// State at the start (kBackward: gradient at the end) of each super, in place of the super's own; `initial`
// of each segment, null: 0.
cudaError_t ReplaceSupers(Flow flow, const MmaSsd& mma, const CudaSsdStates& states, const float* initial,
                          cudaStream_t stream);

}  // namespace annulus::kernels
