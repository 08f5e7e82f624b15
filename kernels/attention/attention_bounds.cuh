#pragma once

// Mask bounds as ranges of key rows, per query row and per query tile. Key positions are affine in the key
// row, so [lo, hi) allows one contiguous range of rows: all later work is in 32-bit key rows of the block.

#include <climits>

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::kernels {

// [begin, end); empty ranges are {0, 0}.
struct KeyRows {
  int begin, end;
};

// What the ranges of a tile's query rows have in common.
struct alignas(16) TileBounds {
  int begin, end;          // covers every row's range; empty when no row sees a key
  int all_begin, all_end;  // key rows that every query row sees

  __device__ static TileBounds OfNoRows() { return {INT_MAX, 0, INT_MIN, INT_MAX}; }
  __device__ bool empty() const { return begin >= end; }
  __device__ bool Touches(int first, int last) const { return begin < last && first < end; }
  // Whether some query row does not see all keys [first, last).
  __device__ bool Masks(int first, int last) const { return first < all_begin || last > all_end; }

  __device__ void Include(KeyRows range) {
    if (range.begin < range.end) {
      begin = min(begin, range.begin);
      end = max(end, range.end);
      all_begin = max(all_begin, range.begin);
      all_end = min(all_end, range.end);
    } else {
      all_begin = INT_MAX;
    }
  }
  __device__ void Include(const TileBounds& other) {
    begin = min(begin, other.begin);
    end = max(end, other.end);
    all_begin = max(all_begin, other.all_begin);
    all_end = min(all_end, other.all_end);
  }
  __device__ TileBounds OverWarp() const {
    return {__reduce_min_sync(~0u, begin), __reduce_max_sync(~0u, end), __reduce_max_sync(~0u, all_begin),
            __reduce_min_sync(~0u, all_end)};
  }
};

// The first key row at or after `position`.
template <typename T>
__device__ int FirstKeyRow(const CudaAttentionBlock<T>& block, int64_t position) {
  if (position <= block.key_offset) return 0;
  const int64_t distance = position - block.key_offset - 1;  // offset >= 0: no overflow
  const int64_t row = (block.key_stride == 1 ? distance : distance / block.key_stride) + 1;
  return static_cast<int>(min(row, block.k_rows));
}

template <typename T>
__device__ KeyRows AllowedKeyRows(const CudaAttentionBlock<T>& block, int64_t q_row, int64_t item) {
  const int64_t token = q_row * block.batch + item;
  const KeyRows rows{FirstKeyRow(block, block.lo[token]), FirstKeyRow(block, block.hi[token])};
  return rows.begin < rows.end ? rows : KeyRows{0, 0};
}

// Ranges of query rows [first, first + kRows) into `ranges` (rows past q_rows see nothing and bind nothing),
// and their bounds to every thread. All threads of the block call it; it ends with a barrier.
template <int kRows, int kThreads, typename T>
__device__ TileBounds LoadKeyRows(const CudaAttentionBlock<T>& block, int64_t first, int64_t item,
                                  KeyRows* ranges) {
  __shared__ TileBounds warps[kThreads / 32];
  TileBounds bounds = TileBounds::OfNoRows();
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += kThreads) {
    ranges[r] = {0, 0};
    if (first + r < block.q_rows) {
      ranges[r] = AllowedKeyRows(block, first + r, item);
      bounds.Include(ranges[r]);
    }
  }
  bounds = bounds.OverWarp();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bounds;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) bounds.Include(warps[w]);
  return bounds;
}

// The range of query row `first` + thread into ranges[thread], as above; the bounds of all to thread 0. All
// threads of the block call it; warps[..], one for each, are free again behind the block's next barrier.
template <typename T>
__device__ TileBounds FillKeyRows(const CudaAttentionBlock<T>& block, int64_t first, int64_t item,
                                  KeyRows* ranges, TileBounds* warps) {
  const int64_t row = first + threadIdx.x;
  KeyRows range{0, 0};
  TileBounds bounds = TileBounds::OfNoRows();
  if (row < block.q_rows) {
    range = AllowedKeyRows(block, row, item);
    bounds.Include(range);
  }
  ranges[threadIdx.x] = range;
  bounds = bounds.OverWarp();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bounds;
  __syncthreads();
  if (threadIdx.x > 0) return bounds;
  for (unsigned w = 1; w < blockDim.x / 32; ++w) bounds.Include(warps[w]);
  return bounds;
}

}  // namespace annulus::kernels
