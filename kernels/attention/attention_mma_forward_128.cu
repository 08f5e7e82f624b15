#include "attention_mma_forward.cuh"

namespace annulus::kernels {

cudaError_t ForwardDim128(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                          cudaStream_t stream) {
  return LaunchForward<ForwardTile<128, 128, TensorCoreForwardTiles(128).keys, 2>>(block, partial, stream);
}

}  // namespace annulus::kernels
