#pragma once

// The kernels' own wrappers of instructions (kernels/common/*.cuh, kernels/attention/mma_primitives.cuh)
// under emulation, but for products (products.h) and what the copy engine does (tensor.h).

#include <cuda_runtime.h>

#include <tuple>
#include <type_traits>

#include "emulation/bf16.h"

namespace annulus::kernels {

// async_copy.cuh
inline uint32_t SharedAddress(const void* pointer) { return emulation::AddressOf(pointer); }

// At once instead of at the wait.
inline void CopyAsync16(uint32_t shared, const void* global, bool inside = true) {
  unsigned char* to = emulation::SharedAt(shared, 16);
  inside ? std::memcpy(to, global, 16) : std::memset(to, 0, 16);
  emulation::WroteShared(shared, 16);
}
inline void CopyAsyncCommit() {}
template <int kPending>
void CopyAsyncWait() {}

// exp2.cuh: results below 2^-126 are 0.
inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

// mma_primitives.cuh
inline void StoreShared(uint32_t address, uint32_t value) {
  std::memcpy(emulation::SharedAt(address, 4), &value, 4);
  emulation::WroteShared(address, 4);
}
inline void StoreShared(uint32_t address, float x, float y) {
  const float values[] = {x, y};
  std::memcpy(emulation::SharedAt(address, 8), values, 8);
  emulation::WroteShared(address, 8);
}
inline uint32_t LoadShared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, emulation::SharedAt(address, 4), 4);
  return value;
}
inline uint32_t PackBf16(float low, float high) {
  return uint32_t{__float2bfloat16_rn(high).bits} << 16 | __float2bfloat16_rn(low).bits;
}
inline void AtomicAdd4(float* to, float x, float y, float z, float w) {
  to[0] += x;
  to[1] += y;
  to[2] += z;
  to[3] += w;
}
inline bool ElectLane() {
  emulation::MeetWarp("elect.sync", 0);
  return emulation::Lane() == 0;
}
inline void BulkFence() { emulation::FenceShared(); }
inline void NamedBarrier(int id, int threads) { emulation::NamedSync(id, threads); }
inline void BarrierOfRoles(int id, int threads) { emulation::NamedSync(id, threads); }
inline void PhaseBarrierInit(uint32_t barrier, int count) { emulation::BarrierInit(barrier, count); }
inline void PhaseBarrierArrive(uint32_t barrier) { emulation::BarrierArrive(barrier); }
inline void PhaseBarrierWait(uint32_t barrier, uint32_t parity) { emulation::BarrierWait(barrier, parity); }

// hopper.cuh
inline unsigned char* DynamicShared() { return emulation::SharedMemory(); }
inline void PhaseBarrierFence() {}
inline void PhaseBarrierExpect(uint32_t barrier, int bytes) { emulation::BarrierExpect(barrier, bytes); }
template <int kRegisters>
void ShrinkRegisters() {
  emulation::MeetGroup("setmaxnreg", kRegisters);
}
template <int kRegisters>
void GrowRegisters() {
  emulation::MeetGroup("setmaxnreg", kRegisters);
}
inline void BarrierArrive(int id, int threads) { emulation::NamedArrive(id, threads); }
inline void WaitForPredecessor() {}
inline void LetSuccessorStart() {}
inline void ClearShared16(uint32_t address) {
  std::memset(emulation::SharedAt(address, 16), 0, 16);
  emulation::WroteShared(address, 16);
}

// One block after the other, as __shared__ variables are static; LaunchEarly: as many at a time as there are
// multiprocessors.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchResident(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                           int resident, Arguments&&... arguments) {
  const std::tuple<std::remove_const_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  const emulation::Launch launch{{blocks.x, blocks.y, blocks.z}, threads, shared_bytes, resident};
  const bool ok = emulation::Run(launch, [&] { std::apply(kernel, copies); });
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
}
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                         cudaStream_t, Arguments&&... arguments) {
  return LaunchResident(kernel, blocks, threads, shared_bytes, 1, std::forward<Arguments>(arguments)...);
}
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchEarly(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                        cudaStream_t, Arguments&&... arguments) {
  return LaunchResident(kernel, blocks, threads, shared_bytes, emulation::Multiprocessors(),
                        std::forward<Arguments>(arguments)...);
}

}  // namespace annulus::kernels

#include "emulation/arrival.h"
#include "emulation/products.h"
#include "emulation/tensor.h"
