#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

const HopperBackwardKernel kHopperBackwardDim192 = BackwardKernelOf<192, 128, 2>();

}  // namespace annulus::kernels
