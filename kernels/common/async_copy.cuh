#pragma once

// Copies from global to shared memory that a thread starts and does not wait for; they go past registers, and
// those of 16 bytes past L1. Whoever started a copy sees it after its own wait, others after a barrier behind
// that.
//
// Instructions stand between #if !defined(ANNULUS_EMULATED) and #endif, here and in the other headers that
// have any: tests/emulation runs kernels on a CPU, and has functions of its own for them.

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

#if !defined(ANNULUS_EMULATED)
__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Zeros when `inside` is false (nothing is read then).
__device__ inline void CopyAsync16(uint32_t shared, const void* global, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
// The same of 4, 8 or 16 bytes.
template <int kBytes>
__device__ inline void CopyAsync(uint32_t shared, const void* global, bool inside = true) {
  if constexpr (kBytes == 16) {
    CopyAsync16(shared, global, inside);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global),
                 "r"(inside ? kBytes : 0), "n"(kBytes)
                 : "memory");
  }
}
// Copies since the last commit become a group.
__device__ inline void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but this thread's newest kPending groups have landed.
template <int kPending>
__device__ inline void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

}  // namespace annulus::kernels
