#include "attention_mma_backward.cuh"

namespace annulus::kernels {

cudaError_t BackwardDim192(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                           const BackwardTables& tables, cudaStream_t stream) {
  return LaunchBackward<BackwardTile<192, 128>, MmaQueryGradient::kAtomic>(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
