#include "attention_mma_backward.cuh"
#include "attention_mma_query_gradient.cuh"

namespace annulus::kernels {

cudaError_t BackwardOrderedDim64(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                 const BackwardTables& tables, cudaStream_t stream) {
  const cudaError_t error =
      LaunchBackward<BackwardTile<64, 64>, MmaQueryGradient::kOrdered>(block, gradients, tables, stream);
  if (error != cudaSuccess) return error;
  return LaunchQueryGradient<QueryGradientTile<64, 64>>(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
