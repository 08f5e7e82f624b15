#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

cudaError_t HopperBackwardDim192(const HopperBackwardArgs& args, MmaQueryGradient query_gradient,
                                 cudaStream_t stream) {
  return LaunchHopperBackward<192, 128, 2>(args, query_gradient, stream);
}

}  // namespace annulus::kernels
