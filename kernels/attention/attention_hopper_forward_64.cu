#include "kernels/attention/attention_hopper_forward_launch.cuh"

namespace annulus::kernels {

const HopperForwardKernel kHopperForwardDim64 =
    ForwardKernelOf<HopperForwardTile<64, 64, 3, 128, 2, 2>>();

}  // namespace annulus::kernels
