#include "kernels/attention/attention_hopper_forward.cuh"

namespace annulus::kernels {

cudaError_t HopperForwardDim128(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                void* workspace, cudaStream_t stream) {
  return LaunchHopperForward<HopperForwardTile<128, 128, 2, 128, 2, 2, Turns::kAsTheyCome>>(
      block, partial, workspace, stream);
}

}  // namespace annulus::kernels
