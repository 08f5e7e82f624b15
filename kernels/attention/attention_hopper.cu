#include <limits>

#include "annulus/ops/attention_tiles.h"
#include "kernels/attention/attention_hopper.h"
#include "kernels/attention/attention_hopper_backward.h"
#include "kernels/attention/attention_hopper_launch.cuh"
#include "kernels/attention/tensor_core_dims.h"
#include "kernels/common/hopper.cuh"

namespace annulus::kernels {
namespace {

// Rows in 32 bits; tiles of all heads and items too.
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - 1024;
constexpr int kSmallestTile = 128, kLargestTile = 192, kMaxGrid = 65535;
constexpr int kClasses = 256;  // of lengths of tiles
// Up to so many tiles the last come first, which are the longest of causal masks: sorting takes 4 us, more
// than it saves (31 against 34 us for a call of 1K rows).
constexpr int kUnsortedTiles = 64;
constexpr int64_t kHeaderBytes = 16;  // of the workspace

// What prices are made of.
constexpr bool AreBackwardTiles(int64_t dim) {
  return HopperBackwardTiles(dim).queries == HopperBackwardQueries(dim) &&
         HopperBackwardTiles(dim).keys == kBackwardKeys;
}
static_assert(AreBackwardTiles(64) && AreBackwardTiles(128) && AreBackwardTiles(192));

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace

bool HopperAttentionAccepts(const HopperAttentionBlock& block) {
  return TensorCoreDims(block.dim, block.v_dim) && 0 <= block.q_rows && block.q_rows <= kMaxRows &&
         0 <= block.k_rows && block.k_rows <= kMaxRows && 0 <= block.batch && block.batch <= kMaxGrid &&
         0 <= block.heads && block.heads <= kMaxGrid &&
         (block.heads == 0 || (block.kv_heads > 0 && block.heads % block.kv_heads == 0)) &&
         RoundUp(block.q_rows, kSmallestTile) / kSmallestTile * block.batch * block.heads <= kMaxRows &&
         block.key_offset >= 0 && block.key_stride >= 1 && block.scale > 0 && Aligned(block.q) &&
         Aligned(block.k) && Aligned(block.v);
}

namespace {

// Of one query tile; a thread per row.
__global__ void FillTables(const __grid_constant__ HopperAttentionBlock block, KeyRows* ranges,
                           TileBounds* bounds, int* next) {
  auto* const warps = reinterpret_cast<TileBounds*>(DynamicShared());
  if constexpr (kHopper) {
    LetSuccessorStart();
    WaitForPredecessor();
  }
  const int64_t tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const TileBounds all =
      FillKeyRows(block, int64_t{blockIdx.x} * blockDim.x, blockIdx.y, ranges + tile * blockDim.x, warps);
  if (threadIdx.x > 0) return;
  bounds[tile] = all;
  if (tile == 0) *next = 0;
}

// Tiles of one item in the order of how many keys they walk over, the longest first, by classes.
__global__ void SortTiles(const TileBounds* bounds, int tiles, int* order) {
  if constexpr (kHopper) {
    LetSuccessorStart();
    WaitForPredecessor();
  }
  // The longest, and of each class its place in the order.
  int* const first = reinterpret_cast<int*>(DynamicShared());
  int& longest = first[kClasses];
  bounds += static_cast<int64_t>(blockIdx.x) * tiles;
  order += static_cast<int64_t>(blockIdx.x) * tiles;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto length = [&](int tile) {
    return bounds[tile].empty() ? 0 : bounds[tile].end - bounds[tile].begin;
  };
  const auto class_of = [&](int tile) {
    return kClasses - 1 - static_cast<int>(int64_t{length(tile)} * (kClasses - 1) / max(longest, 1));
  };
  if (thread == 0) longest = 0;
  first[thread] = 0;
  __syncthreads();
  for (int tile = thread; tile < tiles; tile += kClasses) atomicMax(&longest, length(tile));
  __syncthreads();
  for (int tile = thread; tile < tiles; tile += kClasses) atomicAdd(&first[class_of(tile)], 1);
  __syncthreads();
  int before = 0;
  for (int c = 0; c < thread; ++c) before += first[c];
  __syncthreads();
  first[thread] = before;
  __syncthreads();
  for (int tile = thread; tile < tiles; tile += kClasses) order[atomicAdd(&first[class_of(tile)], 1)] = tile;
}

cudaError_t Launch(const HopperAttentionBlock& block, const HopperAttentionPartial& partial, void* workspace,
                   cudaStream_t stream) {
  if (!HopperAttentionAccepts(block) || !Aligned(partial.out) || !Aligned(partial.result) ||
      reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (block.q_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  const auto launch = (block.dim == 64    ? kHopperForwardDim64
                       : block.dim == 128 ? kHopperForwardDim128
                                          : kHopperForwardDim192)
                          .launch;
  return launch(block, partial, workspace, stream);
}

}  // namespace

int64_t HopperAttentionForwardWorkspaceBytes(const HopperAttentionBlock& block) {
  const int64_t rows = (block.q_rows + kLargestTile) * block.batch,
                tiles = (block.q_rows / kSmallestTile + 1) * block.batch;
  return kHeaderBytes + RoundUp(rows, 2) * static_cast<int64_t>(sizeof(KeyRows)) +
         tiles * static_cast<int64_t>(sizeof(TileBounds) + sizeof(int));
}

cudaError_t FillForwardTables(const HopperAttentionBlock& block, int tile_rows, void* workspace,
                              ForwardTables* tables, cudaStream_t stream) {
  const int64_t tiles = (block.q_rows + tile_rows - 1) / tile_rows;
  char* const header = static_cast<char*>(workspace);
  auto* const bounds = reinterpret_cast<TileBounds*>(header + kHeaderBytes);
  auto* const ranges = reinterpret_cast<KeyRows*>(bounds + tiles * block.batch);
  auto* const order = reinterpret_cast<int*>(ranges + tiles * tile_rows * block.batch);
  *tables = {ranges, bounds, order, reinterpret_cast<int*>(header), static_cast<int>(tiles)};
  const cudaError_t error = LaunchEarly(
      FillTables, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(block.batch)), tile_rows,
      tile_rows / 32 * static_cast<int>(sizeof(TileBounds)), stream, block, ranges, bounds, tables->next);
  if (tiles <= kUnsortedTiles) tables->order = nullptr;
  if (error != cudaSuccess || tables->order == nullptr) return error;
  return SortForwardTiles(bounds, block.batch, tables->query_tiles, order, stream);
}

cudaError_t SortForwardTiles(const TileBounds* bounds, int64_t batch, int query_tiles, int* order,
                             cudaStream_t stream) {
  return LaunchEarly(SortTiles, dim3(static_cast<unsigned>(batch)), kClasses,
                     (kClasses + 1) * static_cast<int>(sizeof(int)), stream, bounds, query_tiles, order);
}

cudaError_t HopperAttentionForward(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                   void* workspace, cudaStream_t stream) {
  if (partial.out.data == nullptr) return cudaErrorInvalidValue;
  return Launch(block, partial, workspace, stream);
}

cudaError_t HopperAttentionForwardWhole(const HopperAttentionBlock& block, CudaHeads<__nv_bfloat16> out,
                                        float* lse, void* workspace, cudaStream_t stream) {
  if (out.data == nullptr) return cudaErrorInvalidValue;
  return Launch(block, {.out = {}, .lse = lse, .result = out}, workspace, stream);
}

}  // namespace annulus::kernels
