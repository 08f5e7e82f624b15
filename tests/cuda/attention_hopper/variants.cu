#include "cuda/attention_hopper/variants.h"
#include "kernels/attention/attention_hopper_forward.cuh"

namespace annulus::testing {

using namespace kernels;

const HopperForwardVariant kHopperForwardVariants[] = {
    {"192 x 80, 2 stages", 128, LaunchHopperForward<HopperForwardTile<128, 128, 3, 80, 2, 1>>},
    {"128 x 176, 2 stages", 128, LaunchHopperForward<HopperForwardTile<128, 128, 2, 176, 2, 1>>},
    {"128 x 128, 1 Q", 128, LaunchHopperForward<HopperForwardTile<128, 128, 2, 128, 2, 1>>},
    {"128 x 128, 3 stages", 64, LaunchHopperForward<HopperForwardTile<64, 64, 2, 128, 3, 2>>},
    {"128 x 192, 2 stages", 64, LaunchHopperForward<HopperForwardTile<64, 64, 2, 192, 2, 2>>},
    {"192 x 128, 4 stages", 64, LaunchHopperForward<HopperForwardTile<64, 64, 3, 128, 4, 2>>},
    {"128 x 112, 2 stages", 192, LaunchHopperForward<HopperForwardTile<192, 128, 2, 112, 2, 1>>},
};
const int kHopperForwardVariantCount = sizeof(kHopperForwardVariants) / sizeof(kHopperForwardVariants[0]);

}  // namespace annulus::testing
