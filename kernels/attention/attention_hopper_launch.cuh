#pragma once

// The forwards of attention_hopper.h, one function per head dim, each defined in a file of its own so that
// they compile in parallel: attention_hopper_forward_<dim>.cu.

#include "kernels/attention/attention_bounds.cuh"
#include "kernels/attention/attention_hopper.h"

namespace annulus::kernels {

// Whether a block is what attention_hopper.h asks for.
bool HopperAttentionAccepts(const HopperAttentionBlock& block);

template <typename T>
bool Aligned(const CudaHeads<T>& x) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % kElements == 0 &&
         x.batch_stride % kElements == 0;
}

// What the forward reads of the mask, made once per call. Query rows are padded to whole tiles.
struct ForwardTables {
  const KeyRows* ranges;     // [batch, query_tiles * rows of a tile]
  const TileBounds* bounds;  // [batch, query_tiles]
  const int* order;          // [batch, query_tiles], of one item the longest first; null: the last first
  int* next;                 // the first tile that no thread block has taken
  int query_tiles;
};

// Where results go: `out` and `lse` are the carry, or `out` has no data and `result` and `lse` are all that
// is written.
using HopperForwardLauncher = cudaError_t(const HopperAttentionBlock& block,
                                          const HopperAttentionPartial& partial, void* workspace,
                                          cudaStream_t stream);

// Fills the tables, of tiles of so many query rows, in a workspace of HopperAttentionForwardWorkspaceBytes.
cudaError_t FillForwardTables(const HopperAttentionBlock& block, int tile_rows, void* workspace,
                              ForwardTables* tables, cudaStream_t stream);

// One choice of tiles: its launch, and the kernels behind it as cudaFuncGetAttributes takes them.
struct HopperForwardKernel {
  HopperForwardLauncher* launch;
  const void *whole, *carry;
};
extern const HopperForwardKernel kHopperForwardDim64, kHopperForwardDim128, kHopperForwardDim192;

// order: [batch, query_tiles], of each item the tiles of the most keys between begin and end first.
cudaError_t SortForwardTiles(const TileBounds* bounds, int64_t batch, int query_tiles, int* order,
                             cudaStream_t stream);

}  // namespace annulus::kernels
