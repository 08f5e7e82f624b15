#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

cudaError_t HopperBackwardDim64(const HopperBackwardArgs& args, MmaQueryGradient query_gradient,
                                cudaStream_t stream) {
  return LaunchHopperBackward<64, 64, 1>(args, query_gradient, stream);
}

}  // namespace annulus::kernels
