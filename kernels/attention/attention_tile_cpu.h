#pragma once

// Tiles of block attention on CPUs, shared by forward and backward.
//
// A query tile holds a few query rows times the `group` query heads that read one KV head, packed so that one
// matrix product serves the whole group:
//
//   tile row m  <->  query row first + m / group, query head kv_head * group + m % group
//
// Key positions are affine in the key row, so the mask bounds [lo, hi) of a query row allow one contiguous
// range of key rows: masking is the choice of loop bounds, and key tiles outside every range are never
// touched.

#include <algorithm>
#include <limits>

#include "annulus/ops/attention.h"
#include "kernels/common/blas.h"

namespace annulus::kernels {

// Scores of a tile are 64 KiB in f32: they stay in the second-level cache with the packed queries.
inline constexpr int64_t kTileRows = 128;
inline constexpr int64_t kTileKeys = 128;

// [begin, end)
struct KeyRange {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
};

// The part of `range` inside `tile`, counted from the tile's begin.
inline KeyRange Within(const KeyRange& range, const KeyRange& tile) {
  return {std::max(range.begin, tile.begin) - tile.begin, std::min(range.end, tile.end) - tile.begin};
}

// Key rows of [0, key_rows) whose positions lie in [lo, hi).
inline KeyRange AllowedKeys(int64_t lo, int64_t hi, const KeyPositions& positions, int64_t key_rows) {
  const auto first_at = [&](int64_t position) {  // the first key row at or after a position
    if (position <= positions.offset) return int64_t{0};
    const int64_t distance = position - positions.offset - 1;  // offset >= 0: no overflow
    return std::min(key_rows, distance / positions.stride + 1);
  };
  return {first_at(lo), first_at(hi)};
}

struct QueryTile {
  int64_t item = 0, kv_head = 0, group = 1;
  int64_t first = 0, rows = 0;  // query rows [first, first + rows)
  KeyRange keys;                // covers the ranges of all rows

  int64_t height() const { return rows * group; }
  int64_t head() const { return kv_head * group; }
};

// Calls fn(tile, ranges) for every query tile that sees a key, in a fixed order. ranges[r] belongs to query
// row tile.first + r.
template <typename Fn>
void ForEachQueryTile(Context& ctx, const AttentionBlock& block, Fn&& fn) {
  if (block.q.heads == 0) return;
  const int64_t group = block.q.heads / block.k.heads;
  const int64_t tile_rows = std::max<int64_t>(1, kTileRows / group);
  const int64_t *lo = block.bounds.lo.data<int64_t>(), *hi = block.bounds.hi.data<int64_t>();
  std::array<KeyRange, kTileRows> ranges;
  for (int64_t item = 0; item < block.q.batch; ++item) {
    for (int64_t first = 0; first < block.q.rows; first += tile_rows) {
      QueryTile tile{.item = item,
                     .group = group,
                     .first = first,
                     .rows = std::min(tile_rows, block.q.rows - first),
                     .keys = {std::numeric_limits<int64_t>::max(), 0}};
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t token = (first + r) * block.q.batch + item;
        const KeyRange range = AllowedKeys(lo[token], hi[token], block.key_positions, block.k.rows);
        ranges[static_cast<size_t>(r)] = range;
        if (range.empty()) continue;
        tile.keys.begin = std::min(tile.keys.begin, range.begin);
        tile.keys.end = std::max(tile.keys.end, range.end);
      }
      if (tile.keys.empty()) {
        ctx.Poll();
        continue;
      }
      for (tile.kv_head = 0; tile.kv_head < block.k.heads; ++tile.kv_head) fn(tile, ranges.data());
    }
  }
}

// Calls fn(keys) for the tiles of keys that the query tile sees, and polls.
template <typename Fn>
void ForEachKeyTile(Context& ctx, const QueryTile& tile, Fn&& fn) {
  for (int64_t begin = tile.keys.begin; begin < tile.keys.end; begin += kTileKeys) {
    fn(KeyRange{begin, std::min(begin + kTileKeys, tile.keys.end)});
    ctx.Poll();
  }
}

// Largest height of a query tile of the block.
inline int64_t MaxTileHeight(const AttentionBlock& block) {
  const int64_t group = block.q.heads / std::max<int64_t>(block.k.heads, 1);
  return std::max(group, kTileRows);
}

template <typename T>
T* ScratchOf(Context& ctx, int64_t elements) {
  return ctx.scratch.Allocate(DTypeOf<T>(), {elements}).template data<T>();
}

template <typename T>
void ZeroHeads(const HeadsRef& x) {
  for (int64_t item = 0; item < x.batch; ++item) {
    for (int64_t row = 0; row < x.rows; ++row) {
      std::fill_n(x.At<T>(item, 0) + row * x.row_stride, x.heads * x.dim, T{0});
    }
  }
}

// First element of the tile's rows in `heads`; row r of the tile is at + r * heads.row_stride, group * dim
// long.
template <typename T, typename Byte>
auto* TileRows(const BasicHeadsRef<Byte>& heads, const QueryTile& tile) {
  return heads.template At<T>(tile.item, tile.head()) + tile.first * heads.row_stride;
}

// packed[height, dim] = factor * the tile's rows of x.
template <typename T>
void Pack(const ConstHeadsRef& x, const QueryTile& tile, T factor, T* packed) {
  const int64_t width = tile.group * x.dim;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = TileRows<T>(x, tile) + r * x.row_stride;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) packed[r * width + i] = factor * row[i];
  }
}

// Rows [begin, ...) of one KV head as an operand of a product.
template <typename T>
BlasOperand<T> KeyOperand(const ConstHeadsRef& x, const QueryTile& tile, int64_t begin,
                          Transpose transpose = Transpose::kNo) {
  return {x.At<T>(tile.item, tile.kv_head) + begin * x.row_stride, std::max(x.row_stride, x.dim), transpose};
}

// products[height, kTileKeys] = packed[height, x.dim] times the tile's keys of x, transposed.
template <typename T>
void MultiplyByKeys(const T* packed, const ConstHeadsRef& x, const QueryTile& tile, const KeyRange& keys,
                    T* products) {
  Gemm<T>({.m = tile.height(),
           .n = keys.size(),
           .k = x.dim,
           .a = {packed, x.dim},
           .b = KeyOperand<T>(x, tile, keys.begin, Transpose::kYes),
           .beta = 0,
           .c = products,
           .c_stride = kTileKeys});
}

// row[0, count) = 0 outside `allowed`, which is not empty.
template <typename T>
void ZeroOutside(const KeyRange& allowed, int64_t count, T* row) {
  std::fill_n(row, allowed.begin, T{0});
  std::fill_n(row + allowed.end, count - allowed.end, T{0});
}

// Index of the tile's query row r in tensors [q_rows, batch, heads], at the tile's first head.
inline int64_t StatIndex(const ConstHeadsRef& q, const QueryTile& tile, int64_t r) {
  return ((tile.first + r) * q.batch + tile.item) * q.heads + tile.head();
}

}  // namespace annulus::kernels
