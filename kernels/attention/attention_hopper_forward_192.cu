#include "kernels/attention/attention_hopper_forward_launch.cuh"

namespace annulus::kernels {

const HopperForwardKernel kHopperForwardDim192 =
    ForwardKernelOf<HopperForwardTile<192, 128, 2, 128, 2, 1>>();

}  // namespace annulus::kernels
