#include "attention_mma_forward.cuh"

namespace annulus::kernels {

cudaError_t ForwardDim192(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                          cudaStream_t stream) {
  return LaunchForward<ForwardTile<192, 128, TensorCoreForwardTiles(192).keys, 1>>(block, partial, stream);
}

}  // namespace annulus::kernels
