#include <limits>

#include "attention_mma.h"
#include "attention_mma_launch.cuh"
#include "kernels/attention/tensor_core_dims.h"

namespace annulus::kernels {
namespace {

// Dimensions of grids besides the first, and rows in 32 bits.
constexpr int64_t kMaxGrid = 65535, kMaxRows = std::numeric_limits<int32_t>::max() - 1024;

template <typename T>
bool Aligned(const CudaHeads<T>& x) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % kElements == 0 &&
         x.batch_stride % kElements == 0;
}

bool Valid(const MmaAttentionBlock& block) {
  return TensorCoreDims(block.dim, block.v_dim) && 0 <= block.q_rows && block.q_rows <= kMaxRows &&
         0 <= block.k_rows && block.k_rows <= kMaxRows && 0 <= block.batch && block.batch <= kMaxGrid &&
         0 <= block.heads && block.heads <= kMaxGrid &&
         (block.heads == 0 || (block.kv_heads > 0 && block.heads % block.kv_heads == 0)) &&
         block.key_offset >= 0 && block.key_stride >= 1 && block.scale > 0 && Aligned(block.q) &&
         Aligned(block.k) && Aligned(block.v);
}

}  // namespace

cudaError_t MmaAttentionForward(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                                cudaStream_t stream) {
  if (!Valid(block) || !Aligned(partial.out) || !Aligned(partial.result)) return cudaErrorInvalidValue;
  if (block.q_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  const auto launch = block.dim == 64 ? ForwardDim64 : block.dim == 128 ? ForwardDim128 : ForwardDim192;
  return launch(block, partial, stream);
}

int64_t MmaAttentionBackwardWorkspaceBytes(const MmaAttentionBlock& block, MmaQueryGradient query_gradient) {
  return BackwardTableBytes(block, {BackwardQueries(block.dim), query_gradient});
}

cudaError_t MmaAttentionBackward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                 MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream) {
  if (!Valid(block) || !Aligned(gradients.dout) || !Aligned(gradients.dq) || !Aligned(gradients.dk) ||
      !Aligned(gradients.dv) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (block.q_rows == 0 || block.k_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  BackwardTables tables;
  cudaError_t error = FillBackwardTables(block, gradients, {BackwardQueries(block.dim), query_gradient},
                                         workspace, &tables, stream);
  if (error != cudaSuccess) return error;
  const bool ordered = query_gradient == MmaQueryGradient::kOrdered;
  switch (block.dim) {
    case 64:
      error = (ordered ? BackwardOrderedDim64 : BackwardDim64)(block, gradients, tables, stream);
      break;
    case 128:
      error = (ordered ? BackwardOrderedDim128 : BackwardDim128)(block, gradients, tables, stream);
      break;
    default:
      error = (ordered ? BackwardOrderedDim192 : BackwardDim192)(block, gradients, tables, stream);
  }
  if (error != cudaSuccess || !ordered) return error;
  return AddShares(block, gradients, tables, stream);
}

}  // namespace annulus::kernels
