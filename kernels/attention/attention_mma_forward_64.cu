#include "attention_mma_forward.cuh"

namespace annulus::kernels {

cudaError_t ForwardDim64(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                         cudaStream_t stream) {
  return LaunchForward<ForwardTile<64, 64, TensorCoreForwardTiles(64).keys, 1>>(block, partial, stream);
}

}  // namespace annulus::kernels
