#include "cuda/attention_hopper/variants.h"
#include "kernels/attention/attention_hopper_forward.cuh"

namespace annulus::testing {

using namespace kernels;

namespace {
constexpr auto kRegisters = QueryOperand::kRegisters;
constexpr auto kShared = QueryOperand::kShared;
constexpr auto kAsTheyCome = Turns::kAsTheyCome;
}  // namespace

const HopperForwardVariant kHopperForwardVariants[] = {
    {"128 x 128, Q in registers", 128,
     LaunchHopperForward<HopperForwardTile<128, 128, 2, 128, 2, 2, kRegisters>>},
    {"128 x 128, no turns", 128,
     LaunchHopperForward<HopperForwardTile<128, 128, 2, 128, 2, 2, kShared, kAsTheyCome>>},
    {"128 x 128, one Q", 128, LaunchHopperForward<HopperForwardTile<128, 128, 2, 128, 2, 1>>},
    {"192 x 80, 3 stages", 128, LaunchHopperForward<HopperForwardTile<128, 128, 3, 80, 3, 1>>},
    {"128 x 160", 128, LaunchHopperForward<HopperForwardTile<128, 128, 2, 160, 2, 1>>},
    {"128 x 176", 128, LaunchHopperForward<HopperForwardTile<128, 128, 2, 176, 2, 1>>},
    {"192 x 128, no turns", 64,
     LaunchHopperForward<HopperForwardTile<64, 64, 3, 128, 2, 2, kShared, kAsTheyCome>>},
    {"192 x 128, 4 stages", 64, LaunchHopperForward<HopperForwardTile<64, 64, 3, 128, 4, 2>>},
    {"128 x 128, 3 stages", 64, LaunchHopperForward<HopperForwardTile<64, 64, 2, 128, 3, 2>>},
    {"128 x 128, Q in registers", 64,
     LaunchHopperForward<HopperForwardTile<64, 64, 2, 128, 3, 2, kRegisters>>},
    {"128 x 192", 64, LaunchHopperForward<HopperForwardTile<64, 64, 2, 192, 2, 2>>},
    {"128 x 128, no turns", 192,
     LaunchHopperForward<HopperForwardTile<192, 128, 2, 128, 2, 1, kShared, kAsTheyCome>>},
    {"128 x 112", 192, LaunchHopperForward<HopperForwardTile<192, 128, 2, 112, 2, 1>>},
};
const int kHopperForwardVariantCount = sizeof(kHopperForwardVariants) / sizeof(kHopperForwardVariants[0]);

}  // namespace annulus::testing
