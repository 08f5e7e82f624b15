#include "attention_hopper_backward.h"
#include "attention_hopper_launch.cuh"
#include "kernels/common/tensor_map.h"

namespace annulus::kernels {
namespace {

PanelsRef PanelsOf(const CudaHeads<const __nv_bfloat16>& x, int64_t rows, int64_t batch, int64_t columns) {
  return {.data = x.data,
          .rows = rows,
          .batch = batch,
          .panels = columns / 64,
          .row_stride = x.row_stride,
          .batch_stride = x.batch_stride};
}

cudaError_t MakeMaps(const HopperAttentionBlock& block, const HopperAttentionGradients& gradients,
                     int queries, HopperBackwardArgs* args) {
  const auto dim = static_cast<int>(block.dim), v_dim = static_cast<int>(block.v_dim);
  const auto query_panels = [&](const auto& x, int64_t columns) {
    return PanelsOf(x, block.q_rows, block.batch, block.heads * columns);
  };
  const auto key_panels = [&](const auto& x, int64_t columns) {
    return PanelsOf(x, block.k_rows, block.batch, block.kv_heads * columns);
  };
  const SumPanelsRef dq{.data = gradients.dq.data,
                        .rows = block.q_rows,
                        .batch = block.batch,
                        .panels = block.heads * dim / 32,
                        .row_stride = gradients.dq.row_stride,
                        .batch_stride = gradients.dq.batch_stride};
  for (const cudaError_t error :
       {MakeTensorMap(query_panels(block.q, dim), queries, dim / 64, &args->q),
        MakeTensorMap(query_panels(gradients.dout, v_dim), queries, v_dim / 64, &args->dout),
        MakeTensorMap(key_panels(block.k, dim), kBackwardKeys, 1, &args->k),
        MakeTensorMap(key_panels(block.v, v_dim), kBackwardKeys, v_dim / 64, &args->v),
        MakeTensorMap(dq, 64, HopperBackwardGradientColumns(dim) / 32, &args->dq)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t PrepareHopperBackward(const HopperAttentionBlock& block,
                                  const HopperAttentionGradients& gradients, const BackwardTableShape& shape,
                                  void* workspace, HopperBackwardArgs* args, cudaStream_t stream) {
  args->dk = gradients.dk, args->dv = gradients.dv;
  args->batch = static_cast<int>(block.batch);
  args->heads = static_cast<int>(block.heads), args->group = static_cast<int>(block.heads / block.kv_heads);
  args->scale = block.scale;
  const cudaError_t error = MakeMaps(block, gradients, shape.queries, args);
  if (error != cudaSuccess) return error;
  return FillBackwardTables(block, gradients, shape, workspace, &args->tables, stream);
}

int64_t HopperAttentionBackwardWorkspaceBytes(const HopperAttentionBlock& block,
                                              MmaQueryGradient query_gradient) {
  return BackwardTableBytes(block, HopperBackwardTables(block.dim, query_gradient));
}

cudaError_t HopperAttentionBackward(const HopperAttentionBlock& block,
                                    const HopperAttentionGradients& gradients,
                                    MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream) {
  if (!HopperAttentionAccepts(block) || !Aligned(gradients.dout) || !Aligned(gradients.dq) ||
      !Aligned(gradients.dk) || !Aligned(gradients.dv) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (block.q_rows == 0 || block.k_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  HopperBackwardArgs args;
  cudaError_t error = PrepareHopperBackward(block, gradients, HopperBackwardTables(block.dim, query_gradient),
                                            workspace, &args, stream);
  if (error != cudaSuccess) return error;
  const auto launch = (block.dim == 64    ? kHopperBackwardDim64
                       : block.dim == 128 ? kHopperBackwardDim128
                                          : kHopperBackwardDim192)
                          .launch;
  error = launch(args, query_gradient, stream);
  if (error != cudaSuccess || query_gradient == MmaQueryGradient::kAtomic) return error;
  return AddShares(block, gradients, args.tables, stream);
}

}  // namespace annulus::kernels
