#include "cuda/attention_hopper/backward_variants.h"
#include "kernels/attention/attention_hopper_backward.cuh"

namespace annulus::testing {

using namespace kernels;

const HopperBackwardVariant kHopperBackwardVariants[] = {
    {"two steps", 128, 64, BackwardKernelOf<128, 128, 2>()},
};
const int kHopperBackwardVariantCount = sizeof(kHopperBackwardVariants) / sizeof(kHopperBackwardVariants[0]);

}  // namespace annulus::testing
