#include "link_hold_kernels.h"

namespace annulus {
namespace {

__device__ uint64_t NowNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Streams of one link take it one after the other, in any order.
__global__ void __launch_bounds__(1)
    TakeLink(unsigned long long* link_free, uint64_t duration_ns, unsigned long long* until) {
  unsigned long long free_ns = *link_free, end = 0, found = 0;
  for (bool taken = false; !taken; free_ns = found) {
    const uint64_t now = NowNs();
    end = (free_ns > now ? free_ns : now) + duration_ns;
    found = atomicCAS(link_free, free_ns, end);
    taken = found == free_ns;
  }
  if (*until < end) *until = end;
}

__global__ void __launch_bounds__(1) HoldLink(const uint64_t* until) {
  constexpr unsigned kSleepNs = 250;
  const uint64_t end = *until;
  while (NowNs() < end) __nanosleep(kSleepNs);
}

}  // namespace

cudaError_t LaunchTakeLink(uint64_t* link_free, uint64_t duration_ns, uint64_t* until, cudaStream_t stream) {
  static_assert(sizeof(uint64_t) == sizeof(unsigned long long));
  TakeLink<<<1, 1, 0, stream>>>(reinterpret_cast<unsigned long long*>(link_free), duration_ns,
                                reinterpret_cast<unsigned long long*>(until));
  return cudaGetLastError();
}

cudaError_t LaunchHoldLink(const uint64_t* until, cudaStream_t stream) {
  HoldLink<<<1, 1, 0, stream>>>(until);
  return cudaGetLastError();
}

}  // namespace annulus
