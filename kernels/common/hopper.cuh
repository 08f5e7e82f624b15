#pragma once

// What kernels of sm_90a share besides products (wgmma.cuh): tiles that the copy engine brings and whose
// arrival a barrier in shared memory counts, registers that warpgroups hand to each other, and barriers at
// which some warps only arrive.
//
//   producer                                     consumer
//   PhaseBarrierWait(empty, parity)              PhaseBarrierWait(full, parity)
//   PhaseBarrierExpect(full, Tile::kBytes)       ... products read the tile ...
//   LoadTile(tile, map, full, row, panel, item)  PhaseBarrierArrive(empty)
//
// `full` is initialised with a count of one: a phase ends when its expected bytes have landed. Products see a
// tile behind the wait without a fence.

#include <cuda.h>
#include <cuda_runtime.h>

#include <utility>

#include "kernels/common/wgmma.cuh"

namespace annulus::kernels {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(ANNULUS_EMULATED)
inline constexpr bool kHopper = true;
#else
inline constexpr bool kHopper = false;  // bodies of kernels that are never launched there
#endif

#if !defined(ANNULUS_EMULATED)
// The block's dynamic shared memory, on 1024 bytes.
__device__ inline unsigned char* DynamicShared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// After initialising barriers, before the block's own barrier: the copy engine sees them too.
__device__ inline void PhaseBarrierFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives at the barrier, whose phase then also waits for `bytes` of copies.
__device__ inline void PhaseBarrierExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Starts the copy of the box of `map` (tensor_map.h) at (row, panel, item) to `tile`, on 1024 bytes, in the
// layout of SharedTile<the box's rows, 64 times its panels>. Rows outside of the tensor become zeros and
// count as landed bytes too. One thread.
__device__ inline void LoadTile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int panel,
                                int item) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], [%6];" ::"r"(tile),
      "l"(&map), "r"(0), "r"(row), "r"(panel), "r"(item), "r"(barrier)
      : "memory");
}
// Starts the copy of a tile to the box of `map` at (row, panel, item), but for rows outside of the tensor.
// Who wrote the tile fences (BulkFence) before the barrier behind which one thread starts the copy; it
// belongs to that thread's groups of bulk copies (BulkCommit, BulkWaitRead, BulkWait).
__device__ inline void StoreTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
      "r"(0), "r"(row), "r"(panel), "r"(item), "r"(tile)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Registers per thread of the calling warpgroup from here on, a multiple of 8. More waits until the block's
// other warpgroups have given up enough.
template <int kRegisters>
__device__ inline void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Counts this warp at named barrier `id` without waiting; others wait there by BarrierOfRoles. `threads`:
// those that arrive and those that wait.
__device__ inline void BarrierArrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Stores four 8x8 matrices of bf16; the address is that of LoadMatrices.
__device__ inline void StoreMatrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ inline void StoreMatricesTransposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// Until the kernel before this one on the stream is over, where this one was launched early.
__device__ inline void WaitForPredecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel on the stream start, if it is launched early and there is room for it.
__device__ inline void LetSuccessorStart() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Zeros, on 16 bytes.
__device__ inline void ClearShared16(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// The one way to launch kernels that are emulated too.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                         cudaStream_t stream, Arguments&&... arguments) {
  kernel<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(
      std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}
// Launches a kernel whose blocks may start while the kernel before it on the stream ends. Before it reads or
// writes device memory it calls WaitForPredecessor, which returns when that kernel is over.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchEarly(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                        cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{.gridDim = blocks,
                                  .blockDim = dim3(static_cast<unsigned>(threads)),
                                  .dynamicSmemBytes = static_cast<size_t>(shared_bytes),
                                  .stream = stream,
                                  .attrs = &early,
                                  .numAttrs = 1};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}
#endif

}  // namespace annulus::kernels
