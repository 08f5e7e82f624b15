#pragma once

// The passes of attention_mma.h, one function per pass and head dim, each defined in a file of its own so
// that they compile in parallel: attention_mma_{forward,backward,backward_ordered}_<dim>.cu.

#include "annulus/ops/attention_tiles.h"
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

// Keys of a tile of the backward.
inline constexpr int kBackwardKeys = TensorCoreBackwardTiles(128).keys;

// What a tile of keys meets: query tiles [first, last) hold every tile that touches it, keys [begin, end) of
// it are seen by some query. A thread block walks over a share of the (head of the group, query tile) pairs
// that this makes: shares of one tile are equal and numbered in order.
struct alignas(8) KeyTileWork {
  int first, last, begin, end;
  int shares;
  int slot;  // of the sums of the first share, where there are several and their order is fixed
};
struct BackwardShare {
  int key_tile;  // item * key_tiles + tile; negative: nothing to do
  int kv_head, number;
};

// What the backward reads, made once per call. Query rows are padded to whole tiles.
struct BackwardTables {
  const RowStats* stats;        // [batch, heads, padded_rows]
  const KeyRows* ranges;        // [batch, padded_rows]
  const TileBounds* bounds;     // [batch, query_tiles]
  const KeyTileWork* work;      // [batch, key_tiles]
  const BackwardShare* shares;  // [most_shares], in the order of the shape
  int* turns;                   // [2, batch, heads, query_tiles], zeros; with ShareOrder::kKeys
  float* sums;                  // [kv_heads, slots, kBackwardKeys, dim + v_dim], of dK and dV
  int64_t padded_rows;
  int query_tiles, key_tiles, most_shares, slots;
};

// Query rows per tile of the backward. A warp of 32 keys holds dim registers per lane of its gradient, and as
// many of its scores as the tile has query rows.
constexpr int BackwardQueries(int64_t dim) { return static_cast<int>(TensorCoreBackwardTiles(dim).queries); }

using ForwardLauncher = cudaError_t(const MmaAttentionBlock&, const MmaAttentionPartial&, cudaStream_t);
using BackwardLauncher = cudaError_t(const MmaAttentionBlock&, const MmaAttentionGradients&,
                                     const BackwardTables&, cudaStream_t);

// The longest shares first; or by their keys, so that thread blocks which wait for those of smaller keys wait
// for blocks that run.
enum class ShareOrder { kLongestFirst, kKeys };
// Which tables: for tiles of `queries` query rows, 32, 64 or 128.
struct BackwardTableShape {
  int queries;
  MmaQueryGradient query_gradient;
  ShareOrder order = ShareOrder::kLongestFirst;
};
int64_t BackwardTableBytes(const MmaAttentionBlock& block, const BackwardTableShape& shape);
// Fills the tables in a workspace of BackwardTableBytes.
cudaError_t FillBackwardTables(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                               const BackwardTableShape& shape, void* workspace, BackwardTables* tables,
                               cudaStream_t stream);
// Adds the sums of tiles of keys with several shares, in order of the shares.
cudaError_t AddShares(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                      const BackwardTables& tables, cudaStream_t stream);

ForwardLauncher ForwardDim64, ForwardDim128, ForwardDim192;
BackwardLauncher BackwardDim64, BackwardDim128, BackwardDim192;
BackwardLauncher BackwardOrderedDim64, BackwardOrderedDim128, BackwardOrderedDim192;

}  // namespace annulus::kernels
