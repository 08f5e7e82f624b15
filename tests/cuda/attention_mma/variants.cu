#include "cuda/attention_mma/variants.h"
#include "kernels/attention/attention_mma_backward.cuh"
#include "kernels/attention/attention_mma_forward.cuh"

namespace annulus::testing {

using namespace kernels;
constexpr auto kOrdered = MmaQueryGradient::kOrdered;

const ForwardVariant kForwardVariants[] = {
    {"forward, 64 keys, 2 stages", 64, LaunchForward<ForwardTile<64, 64, 64, 2>>},
    {"forward, 64 keys, 1 stage", 128, LaunchForward<ForwardTile<128, 128, 64, 1>>},
};
const int kForwardVariantCount = sizeof(kForwardVariants) / sizeof(kForwardVariants[0]);

const BackwardVariant kBackwardVariants[] = {
    {"backward without dQ", 64, LaunchBackward<BackwardTile<64, 64>, kOrdered>},
    {"backward without dQ", 128, LaunchBackward<BackwardTile<128, 128>, kOrdered>},
    {"backward without dQ", 192, LaunchBackward<BackwardTile<192, 128>, kOrdered>},
};
const int kBackwardVariantCount = sizeof(kBackwardVariants) / sizeof(kBackwardVariants[0]);

}  // namespace annulus::testing
