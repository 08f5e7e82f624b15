#pragma once

// Other tile choices, only timed.

#include "kernels/attention/attention_mma_launch.cuh"

namespace annulus::testing {

struct ForwardVariant {
  const char* name;
  int64_t dim;
  kernels::ForwardLauncher* launch;
};
struct BackwardVariant {
  const char* name;
  int64_t dim;
  kernels::BackwardLauncher* launch;
};

extern const ForwardVariant kForwardVariants[];
extern const int kForwardVariantCount;
extern const BackwardVariant kBackwardVariants[];
extern const int kBackwardVariantCount;

}  // namespace annulus::testing
