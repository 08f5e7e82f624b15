#pragma once

// The logistic function, to what its results are rounded to.

#include "kernels/common/exp2.cuh"

namespace annulus::kernels {

// 1 / x, one instruction, to 1 ulp; 0 at infinity and for results below 2^-126.
__device__ inline float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// bf16 keeps 8 bits: the special-function units' 21 suffice there, and f32 gets the library's.
template <typename T>
__device__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return Reciprocal(1.0f + Exp2(-kLog2E * x));
  return 1.0f / (1.0f + expf(-x));
}

}  // namespace annulus::kernels
