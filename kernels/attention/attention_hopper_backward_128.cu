#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

const HopperBackwardKernel kHopperBackwardDim128 = BackwardKernelOf<128, 128, 1>();

}  // namespace annulus::kernels
