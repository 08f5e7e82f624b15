#pragma once

// Flags in device memory that a copy engine, another GPU or the host raises while a kernel runs
// (cuStreamWriteValue32 behind the copy of what they announce), and what else a kernel that waits for them
// needs.
//
//   stream:  copy of the data; write of the flag        kernel:  LoadFlag until it is raised
//                                                                AcquireArrivals
//                                                                LoadTile and ordinary loads of the data

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

#if !defined(ANNULUS_EMULATED)
__device__ inline uint32_t LoadFlag(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
// Between flags that were seen raised and loads by the same thread, of the copy engine too, of what they
// announce.
__device__ inline void AcquireArrivals() {
  asm volatile("fence.acq_rel.sys;\n\tfence.proxy.async;" ::: "memory");
}

// Adds, and orders all the thread knows of before and all it does after it among the device's threads that
// do the same.
__device__ inline int AddAcquireRelease(int* to, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(value)
               : "memory");
  return before;
}

__device__ inline uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// To host memory, whole, before anything that ends the kernel.
__device__ inline void StoreToHost(int4* to, int4 value) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};\n\tfence.acq_rel.sys;" ::"l"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
#endif

}  // namespace annulus::kernels
