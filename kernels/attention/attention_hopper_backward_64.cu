#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

const HopperBackwardKernel kHopperBackwardDim64 = BackwardKernelOf<64, 64, 1>();

}  // namespace annulus::kernels
