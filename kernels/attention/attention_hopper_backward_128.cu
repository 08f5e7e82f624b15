#include "attention_hopper_backward.cuh"

namespace annulus::kernels {

cudaError_t HopperBackwardDim128(const HopperBackwardArgs& args, MmaQueryGradient query_gradient,
                                 cudaStream_t stream) {
  return LaunchHopperBackward<128, 128, 1>(args, query_gradient, stream);
}

}  // namespace annulus::kernels
