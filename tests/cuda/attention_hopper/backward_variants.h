#pragma once

// Other tile choices of the backward on Hopper, only timed.

#include "kernels/attention/attention_hopper_backward.h"

namespace annulus::testing {

struct HopperBackwardVariant {
  const char* name;
  int64_t dim;
  int queries;  // of a tile
  kernels::HopperBackwardKernel kernel;
};

extern const HopperBackwardVariant kHopperBackwardVariants[];
extern const int kHopperBackwardVariantCount;

}  // namespace annulus::testing
