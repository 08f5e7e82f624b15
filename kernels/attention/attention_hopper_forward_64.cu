#include "kernels/attention/attention_hopper_forward.cuh"

namespace annulus::kernels {

cudaError_t HopperForwardDim64(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                               void* workspace, cudaStream_t stream) {
  return LaunchHopperForward<HopperForwardTile<64, 64, 3, 128, 2, 2>>(block, partial, workspace, stream);
}

}  // namespace annulus::kernels
