#include "attention_mma_backward.cuh"

namespace annulus::kernels {

cudaError_t BackwardDim128(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                           const BackwardTables& tables, cudaStream_t stream) {
  return LaunchBackward<BackwardTile<128, 128>, MmaQueryGradient::kAtomic>(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
