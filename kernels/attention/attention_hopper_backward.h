#pragma once

// What the backward on Hopper (attention_hopper_backward.cuh) is given, and its launch per head dim, each
// defined in a file of its own so that they compile in parallel.

#include <cuda.h>

#include "attention_hopper.h"
#include "attention_mma_launch.cuh"

namespace annulus::kernels {

// Query rows per tile: a warpgroup takes dQ of 64 rows at a time, and with little work per row two of them.
constexpr int HopperBackwardQueries(int64_t dim) { return dim == 64 ? 128 : 64; }

// Columns of dQ of one warpgroup.
constexpr int HopperBackwardGradientColumns(int64_t dim) { return dim == 192 ? 96 : 64; }

struct HopperBackwardArgs {
  // q, dout: boxes of a query tile; k, v: of a key tile; dq: of 64 rows and what a warpgroup has of them.
  CUtensorMap q, k, v, dout, dq;
  CudaHeads<float> dk, dv;
  BackwardTables tables;
  int batch, heads, group;  // query heads, and those of one KV head
  float scale;
};

// Tables of the tiles above.
constexpr BackwardTableShape HopperBackwardTables(int64_t dim, MmaQueryGradient query_gradient) {
  return {HopperBackwardQueries(dim), query_gradient,
          query_gradient == MmaQueryGradient::kOrdered ? ShareOrder::kKeys : ShareOrder::kLongestFirst};
}

// Makes maps and tables in a workspace of BackwardTableBytes.
cudaError_t PrepareHopperBackward(const HopperAttentionBlock& block,
                                  const HopperAttentionGradients& gradients, const BackwardTableShape& shape,
                                  void* workspace, HopperBackwardArgs* args, cudaStream_t stream);

// Adds the gradients; in a fixed order dK and dV of several shares not yet (AddShares).
using HopperBackwardLauncher = cudaError_t(const HopperBackwardArgs& args, MmaQueryGradient query_gradient,
                                           cudaStream_t stream);
// One choice of tiles: its launch, and the kernels behind it as cudaFuncGetAttributes takes them.
struct HopperBackwardKernel {
  HopperBackwardLauncher* launch;
  const void *added, *ordered;
};
extern const HopperBackwardKernel kHopperBackwardDim64, kHopperBackwardDim128, kHopperBackwardDim192;

}  // namespace annulus::kernels
