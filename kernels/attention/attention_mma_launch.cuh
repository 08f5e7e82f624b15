#pragma once

// The passes of attention_mma.h, one function per pass and head dim, each defined in a file of its own so
// that they compile in parallel: attention_mma_{forward,backward,backward_ordered}_<dim>.cu.

#include "attention_bounds.cuh"
#include "attention_mma.h"

namespace annulus::kernels {

// Weights of the backward are 2^15 times too large, and what they multiply is scaled back at the end: then
// f16 holds every weight above 2^-29 to 11 bits (and 1 and its rounding errors), which carries them from warp
// to warp with far less error than the bf16 of the products.
inline constexpr int kWeightExponent = 15;
inline constexpr float kUnscaleWeight = 1.0f / (1 << kWeightExponent);

// LSE in units of log2, less kWeightExponent; +inf where it is -inf or the row does not exist, so that such
// rows weigh zero.
struct alignas(8) RowStats {
  float lse, delta;
};

// What the backward reads per query row, transposed once per call. Query rows are padded to whole tiles.
struct BackwardTables {
  const RowStats* stats;     // [batch, heads, padded_rows]
  const KeyRows* ranges;     // [batch, padded_rows]
  const TileBounds* bounds;  // [batch, query_tiles]
  int64_t padded_rows;
  int query_tiles;
};

// Query rows per tile of the backward. A warp of 32 keys holds dim registers per lane of its gradient, and as
// many of its scores as the tile has query rows.
constexpr int BackwardQueries(int64_t dim) { return dim > 128 ? 32 : 64; }

using ForwardLauncher = cudaError_t(const MmaAttentionBlock&, const MmaAttentionPartial&, cudaStream_t);
using BackwardLauncher = cudaError_t(const MmaAttentionBlock&, const MmaAttentionGradients&,
                                     const BackwardTables&, cudaStream_t);

ForwardLauncher ForwardDim64, ForwardDim128, ForwardDim192;
BackwardLauncher BackwardDim64, BackwardDim128, BackwardDim192;
BackwardLauncher BackwardOrderedDim64, BackwardOrderedDim128, BackwardOrderedDim192;

}  // namespace annulus::kernels
