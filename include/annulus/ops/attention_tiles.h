#pragma once

// Tiles of our own block kernels on tensor cores (kernels/attention/attention_mma_*.cuh and
// attention_hopper_*.cuh), for those who predict their time: of a mask whole tiles are skipped, and what is
// left of a tile costs as much as all.

#include <cstdint>

namespace annulus {

struct AttentionTiles {
  int64_t queries = 1, keys = 1;
  // Of the thread blocks that each walk over all keys of a tile of queries, so many run on a multiprocessor
  // at a time. 0: walks are cut, or the longest begin first, so that all multiprocessors are done at about
  // the same time.
  int64_t walks_per_multiprocessor = 0;
};

constexpr AttentionTiles TensorCoreForwardTiles(int64_t dim) { return {128, dim == 64 ? 128 : 64, 2}; }
constexpr AttentionTiles TensorCoreBackwardTiles(int64_t dim) { return {dim > 128 ? 32 : 64, 128, 0}; }
constexpr AttentionTiles HopperForwardTiles(int64_t dim) { return {dim == 64 ? 192 : 128, 128, 0}; }
constexpr AttentionTiles HopperBackwardTiles(int64_t dim) { return {dim == 64 ? 128 : 64, 128, 0}; }

}  // namespace annulus
