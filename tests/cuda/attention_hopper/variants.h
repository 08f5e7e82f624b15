#pragma once

// Other tile choices of the forward, only timed.

#include "kernels/attention/attention_hopper_launch.cuh"

namespace annulus::testing {

struct HopperForwardVariant {
  const char* name;
  int64_t dim;
  kernels::HopperForwardKernel kernel;
};

extern const HopperForwardVariant kHopperForwardVariants[];
extern const int kHopperForwardVariantCount;

}  // namespace annulus::testing
