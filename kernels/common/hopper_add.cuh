#pragma once

// Sums of tiles of shared memory into tensors, by the copy engine of Hopper (hopper.cuh), and flags in device
// memory that order them among thread blocks.

#include "kernels/common/hopper.cuh"

namespace annulus::kernels {

#if !defined(ANNULUS_EMULATED)
// Starts the sum of the tile at shared address `tile`, on 1024 bytes, into the box of `map` (tensor_map.h,
// f32) at (row, panel, item); rows outside of the tensor are left out. One thread, which commits and waits as
// for BulkAdd; the writers of the tile fence (BulkFence) before the barrier that precedes the sum.
__device__ inline void AddTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::
          "l"(&map),
      "r"(0), "r"(row), "r"(panel), "r"(item), "r"(tile)
      : "memory");
}

// Between sums of the copy engine into device memory, complete (BulkWait), and a flag that says so; and
// between such a flag and sums.
__device__ inline void BulkFenceGlobal() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ inline int LoadAcquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ inline void StoreRelease(int* flag, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
#endif

}  // namespace annulus::kernels
