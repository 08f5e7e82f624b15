#include "attention_mma_backward.cuh"
#include "attention_mma_query_gradient.cuh"

namespace annulus::kernels {

cudaError_t BackwardOrderedDim192(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                  const BackwardTables& tables, cudaStream_t stream) {
  const cudaError_t error =
      LaunchBackward<BackwardTile<192, 128>, MmaQueryGradient::kOrdered>(block, gradients, tables, stream);
  if (error != cudaSuccess) return error;
  return LaunchQueryGradient<QueryGradientTile<192, 128>>(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
