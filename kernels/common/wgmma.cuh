#pragma once

// Warpgroup-level matrix instructions of sm_90a: bf16 products of 64 rows, which four warps start together
// and do not wait for, out of shared memory in the layout of SharedTile (mma_primitives.cuh), tiles on 1024
// bytes.
//
// Warp w of the four holds rows 16 w ... + 15 of the product in C fragments of m16n8k16, and of a left
// operand in registers in its A fragments. A product is issued between GroupFence and GroupCommit; its
// accumulators and a left operand in registers belong to it until GroupWait. Who wrote to shared memory by
// other means fences (BulkFence) before the barrier behind which a product reads it.

#include "kernels/attention/mma_primitives.cuh"

namespace annulus::kernels {

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "sm_90 without its own features: build for 90a"
#endif

// How an operand lies in its tile: rows of the tile along its rows or columns (left [m, k], right [n, k]), or
// along k.
enum class Major { kDepthInRow = 0, kDepthAcrossRows = 1 };

#if !defined(ANNULUS_EMULATED)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ inline void GroupFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void GroupCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the newest kPending committed groups are complete.
template <int kPending>
__device__ inline void GroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
#endif
// Keeps the compiler from moving uses of accumulators across a GroupWait or a GroupFence.
template <int kN>
__device__ inline void GroupUse(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}
#endif

// Descriptors of an operand that starts at row `row` and 16-byte chunk `chunk` of a tile at shared address
// `tile`, of SharedTile<kRows, ..>. Rows in steps of 8; chunks in steps of 2 inside a panel of 64 columns.
//   kDepthInRow       stride between groups of 8 rows; the next 16 of k are 2 chunks on, at 64 in the next
//   panel kDepthAcrossRows  the same, and the stride between panels; the next 16 of k are 16 rows on
template <int kRows>
__device__ inline uint64_t OperandAt(uint32_t tile, int row, int chunk) {
  constexpr uint64_t kGroupBytes = 8 * 128, kPanelBytes = kRows * 128, kSwizzle128 = 1;
  // All but the tile is one constant where row and chunk are.
  const auto offset = static_cast<uint32_t>(chunk / 8 * (kRows * 128) + row * 128 + chunk % 8 * 16);
  const uint32_t low = (tile >> 4) + ((offset >> 4) + static_cast<uint32_t>(kPanelBytes >> 4 << 16));
  return (kGroupBytes >> 4 << 32) | (kSwizzle128 << 62) | low;
}

// c (=, +=) a b for 16 of k: `keep` 0 or 1. c holds 8 columns an element, 16 to 256 in all.
//   MultiplyShared<left, right>(c, a, b, keep)   a and b descriptors
//   MultiplyRegisters<right>(c, a, b, keep)      a an A fragment of 16 of k
#if !defined(ANNULUS_EMULATED)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Names of the first 8 n registers of an instruction, its accumulators, and what they are bound to.
#define ANNULUS_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ANNULUS_NAMES_2 ANNULUS_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ANNULUS_NAMES_3 ANNULUS_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ANNULUS_NAMES_4 ANNULUS_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ANNULUS_NAMES_5 ANNULUS_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ANNULUS_NAMES_6 ANNULUS_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ANNULUS_NAMES_7 ANNULUS_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ANNULUS_NAMES_8 ANNULUS_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ANNULUS_NAMES_9 ANNULUS_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ANNULUS_NAMES_10 ANNULUS_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ANNULUS_NAMES_11 ANNULUS_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ANNULUS_NAMES_12 ANNULUS_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ANNULUS_FRAGMENT(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define ANNULUS_BOUND_1 ANNULUS_FRAGMENT(0), ANNULUS_FRAGMENT(1)
#define ANNULUS_BOUND_2 ANNULUS_BOUND_1, ANNULUS_FRAGMENT(2), ANNULUS_FRAGMENT(3)
#define ANNULUS_BOUND_3 ANNULUS_BOUND_2, ANNULUS_FRAGMENT(4), ANNULUS_FRAGMENT(5)
#define ANNULUS_BOUND_4 ANNULUS_BOUND_3, ANNULUS_FRAGMENT(6), ANNULUS_FRAGMENT(7)
#define ANNULUS_BOUND_5 ANNULUS_BOUND_4, ANNULUS_FRAGMENT(8), ANNULUS_FRAGMENT(9)
#define ANNULUS_BOUND_6 ANNULUS_BOUND_5, ANNULUS_FRAGMENT(10), ANNULUS_FRAGMENT(11)
#define ANNULUS_BOUND_7 ANNULUS_BOUND_6, ANNULUS_FRAGMENT(12), ANNULUS_FRAGMENT(13)
#define ANNULUS_BOUND_8 ANNULUS_BOUND_7, ANNULUS_FRAGMENT(14), ANNULUS_FRAGMENT(15)
#define ANNULUS_BOUND_9 ANNULUS_BOUND_8, ANNULUS_FRAGMENT(16), ANNULUS_FRAGMENT(17)
#define ANNULUS_BOUND_10 ANNULUS_BOUND_9, ANNULUS_FRAGMENT(18), ANNULUS_FRAGMENT(19)
#define ANNULUS_BOUND_11 ANNULUS_BOUND_10, ANNULUS_FRAGMENT(20), ANNULUS_FRAGMENT(21)
#define ANNULUS_BOUND_12 ANNULUS_BOUND_11, ANNULUS_FRAGMENT(22), ANNULUS_FRAGMENT(23)

// kColumns = 16 kPairs; then the names of the operands behind the accumulators.
#define ANNULUS_GROUP_PRODUCT(kColumns, kPairs, o0, o1, o2, o3, o4, o5, o6)                                 \
  template <Major kLeft, Major kRight>                                                                      \
  __device__ inline void MultiplyShared(float (&c)[2 * kPairs][4], uint64_t a, uint64_t b, int keep) {      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " o2 ", 0; wgmma.mma_async.sync.aligned.m64n" #kColumns    \
                 "k16.f32.bf16.bf16 {" ANNULUS_NAMES_##kPairs "}, " o0 ", " o1 ", p, 1, 1, " o3 ", " o4     \
                                                              "; }"                                         \
                 : ANNULUS_BOUND_##kPairs                                                                   \
                 : "l"(a), "l"(b), "r"(keep), "n"(static_cast<int>(kLeft)), "n"(static_cast<int>(kRight))); \
  }                                                                                                         \
  template <Major kRight>                                                                                   \
  __device__ inline void MultiplyRegisters(float (&c)[2 * kPairs][4], const uint32_t (&a)[4], uint64_t b,   \
                                           int keep) {                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " o5 ", 0; wgmma.mma_async.sync.aligned.m64n" #kColumns    \
                 "k16.f32.bf16.bf16 {" ANNULUS_NAMES_##kPairs "}, {" o0 ", " o1 ", " o2 ", " o3 "}, " o4    \
                                                              ", p, 1, 1, " o6 "; }"                        \
                 : ANNULUS_BOUND_##kPairs                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep),                           \
                   "n"(static_cast<int>(kRight)));                                                          \
  }

ANNULUS_GROUP_PRODUCT(32, 2, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
ANNULUS_GROUP_PRODUCT(64, 4, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ANNULUS_GROUP_PRODUCT(80, 5, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
ANNULUS_GROUP_PRODUCT(112, 7, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
ANNULUS_GROUP_PRODUCT(128, 8, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ANNULUS_GROUP_PRODUCT(160, 10, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
ANNULUS_GROUP_PRODUCT(176, 11, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
ANNULUS_GROUP_PRODUCT(192, 12, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
#undef ANNULUS_GROUP_PRODUCT
#undef ANNULUS_FRAGMENT

#else  // never launched there
__device__ inline void GroupFence() { __trap(); }
__device__ inline void GroupCommit() {}
template <int kPending>
__device__ inline void GroupWait() {}
template <Major kLeft, Major kRight, int kN>
__device__ inline void MultiplyShared(float (&)[kN][4], uint64_t, uint64_t, int) {}
template <Major kRight, int kN>
__device__ inline void MultiplyRegisters(float (&)[kN][4], const uint32_t (&)[4], uint64_t, int) {}
#endif
#endif

}  // namespace annulus::kernels
