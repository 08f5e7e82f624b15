#pragma once

// kernels/common/arrival.cuh under emulation. What raises flags is a hook that runs each time a kernel looks
// at one.

#include <cstdint>
#include <functional>

#include "emulation/block.h"

namespace annulus::emulation {

inline std::function<void()> g_raise_flags;

}  // namespace annulus::emulation

namespace annulus::kernels {

inline uint32_t LoadFlag(const uint32_t* flag) {
  if (emulation::g_raise_flags) emulation::g_raise_flags();
  return *flag;
}
inline void AcquireArrivals() {}
inline int AddAcquireRelease(int* to, int value) { return std::exchange(*to, *to + value); }
// A microsecond for each time somebody asks.
inline uint64_t Nanoseconds() {
  static uint64_t now = 0;
  return now += 1000;
}
inline void StoreToHost(int4* to, int4 value) { *to = value; }

}  // namespace annulus::kernels
