#include "attention_mma_backward.cuh"

namespace annulus::kernels {

cudaError_t BackwardDim64(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                          const BackwardTables& tables, cudaStream_t stream) {
  return LaunchBackward<BackwardTile<64, 64>, MmaQueryGradient::kAtomic>(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
