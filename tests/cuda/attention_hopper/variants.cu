#include "cuda/attention_hopper/variants.h"
#include "kernels/attention/attention_hopper_forward_launch.cuh"

namespace annulus::testing {

using namespace kernels;

namespace {
constexpr auto kAsTheyCome = Turns::kAsTheyCome;
}  // namespace

const HopperForwardVariant kHopperForwardVariants[] = {
    {"128 x 128, in turns", 128, ForwardKernelOf<HopperForwardTile<128, 128, 2, 128, 2, 2>>()},
    {"128 x 128, one Q", 128, ForwardKernelOf<HopperForwardTile<128, 128, 2, 128, 2, 1>>()},
    {"192 x 128, no turns", 64, ForwardKernelOf<HopperForwardTile<64, 64, 3, 128, 2, 2, kAsTheyCome>>()},
    {"192 x 128, 3 stages", 64, ForwardKernelOf<HopperForwardTile<64, 64, 3, 128, 3, 2>>()},
    {"128 x 128, no turns", 192, ForwardKernelOf<HopperForwardTile<192, 128, 2, 128, 2, 1, kAsTheyCome>>()},
};
const int kHopperForwardVariantCount = sizeof(kHopperForwardVariants) / sizeof(kHopperForwardVariants[0]);

}  // namespace annulus::testing
