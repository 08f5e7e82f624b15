#pragma once

namespace annulus::kernels {

// exp(x) = 2^(x log2 e)
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#if !defined(ANNULUS_EMULATED)
// 2^x, one instruction, to 2 ulp; 0 at -inf and for results below 2^-126.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

}  // namespace annulus::kernels
