#pragma once

// Warp-level matrix instructions of sm_80 and newer: bf16 m16n8k16 products, ldmatrix, asynchronous copies,
// and the one shared-memory tile layout they all use.
//
// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4, each register two adjacent bf16:
//
//   A [16, 16]  a0 (row g, k 2t)  a1 (row g + 8, k 2t)  a2 (row g, k 2t + 8)  a3 (row g + 8, k 2t + 8)
//   B [16,  8]  b0 (k 2t, column g)  b1 (k 2t + 8, column g)
//   C [16,  8]  c0 c1 (row g, columns 2t, 2t + 1)  c2 c3 (row g + 8, the same columns), f32
//
// C of two adjacent column blocks, rounded, is an A fragment with k running along those columns: products
// chain in registers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/exp2.cuh"

namespace annulus::kernels {

inline constexpr float kInfinity = __builtin_huge_valf();

#if !defined(ANNULUS_EMULATED)
__device__ inline void StoreShared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void StoreShared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ inline uint32_t LoadShared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b
__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two floats to nearest, `low` in the low half.
__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline uint32_t PackHalf(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline float2 UnpackHalf(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}
#endif

// The A fragment of two adjacent C fragments.
__device__ inline void PackFragment(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = PackBf16(left[0], left[1]);
  a[1] = PackBf16(left[2], left[3]);
  a[2] = PackBf16(right[0], right[1]);
  a[3] = PackBf16(right[2], right[3]);
}

#if !defined(ANNULUS_EMULATED)
// Adds four adjacent floats to global memory; no order among threads.
__device__ inline void AtomicAdd4(float* to, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z),
               "f"(w)
               : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
  atomicAdd(to + 2, z);
  atomicAdd(to + 3, w);
#endif
}

// Asynchronous sums of shared into global memory, sm_90 and newer: the copy engine adds while the warps go
// on. 16-byte aligned; the writers of the shared memory fence before the barrier that precedes the sum.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasBulkAdd = true;
// True in one lane of the warp; the compiler knows that it is one, and issues its sums without a loop over
// lanes.
__device__ inline bool ElectLane() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}
__device__ inline void BulkFence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void BulkAdd(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
}
__device__ inline void BulkCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's sums have read their shared memory, or are complete.
__device__ inline void BulkWaitRead() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void BulkWait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
#else
inline constexpr bool kHasBulkAdd = false;
__device__ inline bool ElectLane() { return false; }
__device__ inline void BulkFence() {}
__device__ inline void BulkAdd(float*, uint32_t, int) {}
__device__ inline void BulkCommit() {}
__device__ inline void BulkWaitRead() {}
__device__ inline void BulkWait() {}
#endif

// Barrier of `threads` threads of the block, whole warps; ids 0 to 15.
__device__ inline void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same where warps come to it from different code. PTX allows bar.sync there too (its .aligned is about
// the threads of one warp), but synccheck of compute-sanitizer wants all warps in one place then.
__device__ inline void BarrierOfRoles(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier in 8 bytes of shared memory at which some threads arrive without waiting and others wait: a phase
// ends when `count` threads have arrived. A wait names the parity of its phase, 0 for the first.
__device__ inline void PhaseBarrierInit(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void PhaseBarrierArrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define ANNULUS_PHASE_TEST "mbarrier.try_wait"  // sleeps a while
#else
#define ANNULUS_PHASE_TEST "mbarrier.test_wait"
#endif
__device__ inline void PhaseBarrierWait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{ .reg .pred p; " ANNULUS_PHASE_TEST
                 ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (over == 0);
}
#undef ANNULUS_PHASE_TEST
#endif

// Largest and sum over the four lanes that share a row of C.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Four adjacent columns out of a C fragment: even lanes get row g, odd lanes row g + 8, both columns
// 4 (t / 2) ... + 3, so that a lane moves 16 bytes.
struct FragmentRow {
  int row, column;
  float x, y, z, w;
};
__device__ inline FragmentRow GatherRow(const float (&c)[4], int lane) {
  const bool odd = lane & 1;
  const float first = __shfl_xor_sync(~0u, odd ? c[0] : c[2], 1);
  const float second = __shfl_xor_sync(~0u, odd ? c[1] : c[3], 1);
  const int row = lane / 4 + (odd ? 8 : 0), column = (lane & 2) * 2;
  if (odd) return {row, column, first, second, c[2], c[3]};
  return {row, column, c[0], c[1], first, second};
}

// Layout of a [kRows, kColumns] bf16 tile in shared memory, 128-byte aligned: panels of 64 columns, rows of
// 128 bytes in each, 16-byte chunk c of row r at place c ^ (r % 8). The eight rows of one ldmatrix matrix
// fall on distinct banks, as do eight threads that fill a row.
template <int kRows, int kColumns>
struct SharedTile {
  static_assert(kRows % 16 == 0 && kColumns % 64 == 0);
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kColumns / 64 * kPanelBytes;

  // Byte offset of the 16-byte chunk of columns [8 chunk, 8 chunk + 8).
  __device__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16);
  }
  // What `lane` passes to ldmatrix for the 16x16 fragment at (row, 8 chunk); row a multiple of 16. The
  // hardware wants the registers of an operand adjacent and in order, so which of two orders of the four 8x8
  // matrices:
  //
  //   LaneOffset          down, then right   A of [m, k]; transposed: two B fragments of [k, n]
  //   CrossedLaneOffset   right, then down   two B fragments of [n, k]; transposed: A of [k, m]
  __device__ static uint32_t LaneOffset(int lane, int row = 0, int chunk = 0) {
    return Offset(row + lane % 16, chunk + lane / 16);
  }
  __device__ static uint32_t CrossedLaneOffset(int lane, int row = 0, int chunk = 0) {
    return Offset(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
  }
  // Address of the fragment 16 i rows below and 16 j columns right of a lane address with chunk = 0.
  __device__ static uint32_t At(uint32_t lane_address, int i, int j) {
    return (lane_address ^ static_cast<uint32_t>(j % 4 * 32)) +
           static_cast<uint32_t>(j / 4 * kPanelBytes + i * 16 * 128);
  }

  // Starts the copy of rows [0, kRows) at `rows`, stride in elements; rows outside [begin, end) become zeros.
  template <int kThreads>
  __device__ static void Load(uint32_t tile, const __nv_bfloat16* rows, int64_t stride, int begin, int end) {
    constexpr int kRowsPerPass = kThreads / 8;
    static_assert(kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % 8;
    const uint32_t to = tile + Offset(thread / 8, chunk);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const int row = thread / 8 + pass * kRowsPerPass;
      const bool inside = begin <= row && row < end;
      const __nv_bfloat16* from = rows + row * stride + chunk * 8;
#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        CopyAsync16(to + static_cast<uint32_t>(pass * kRowsPerPass * 128 + panel * kPanelBytes),
                    from + panel * 64, inside);
      }
    }
  }
};

}  // namespace annulus::kernels
