#include "kernels/attention/attention_hopper_forward_launch.cuh"

namespace annulus::kernels {

const HopperForwardKernel kHopperForwardDim128 =
    ForwardKernelOf<HopperForwardTile<128, 128, 2, 128, 2, 2, Turns::kAsTheyCome>>();

}  // namespace annulus::kernels
