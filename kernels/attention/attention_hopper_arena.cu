#include <limits>

#include "kernels/attention/attention_hopper_arena.cuh"

namespace annulus::kernels {
namespace {

constexpr int kSmallestTile = 128, kLargestTile = 192;
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

// Of the chunks, what the mask asks.
struct ArenaKeys {
  int64_t offset[kMaxHopperArenaChunks], stride[kMaxHopperArenaChunks];
  int rows[kMaxHopperArenaChunks];
  int count;
};

// Of one query tile; a thread per row. totals: keys from 0 to the sum over all chunks.
__global__ void FillChunkTables(const __grid_constant__ HopperAttentionBlock block,
                                const __grid_constant__ ArenaKeys keys, KeyRows* ranges, TileBounds* bounds,
                                TileBounds* totals, uint64_t* needed) {
  __shared__ TileBounds warps[2][kLargestTile / 32];
  const int64_t tiles = int64_t{gridDim.x} * gridDim.y, tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  uint64_t seen = 0;
  int64_t length = 0;
  HopperAttentionBlock chunk = block;
  for (int c = 0; c < keys.count; ++c) {
    chunk.k_rows = keys.rows[c];
    chunk.key_offset = keys.offset[c];
    chunk.key_stride = keys.stride[c];
    const TileBounds all = FillKeyRows(chunk, int64_t{blockIdx.x} * blockDim.x, blockIdx.y,
                                       ranges + (c * tiles + tile) * blockDim.x, warps[c % 2]);
    if (threadIdx.x > 0) continue;
    bounds[c * tiles + tile] = all;
    if (all.empty()) continue;
    seen |= uint64_t{1} << c;
    length += all.end - all.begin;
  }
  if (threadIdx.x > 0) return;
  totals[tile] = {0, static_cast<int>(min(length, int64_t{INT_MAX})), 0, 0};
  needed[tile] = seen;
}

// The workspace: first what begins as zeros.
struct Layout {
  int64_t tiles, all_tiles;  // of queries, and those of all heads
  int64_t seen, stored, queue, zeros_end;
  int64_t needed, totals, bounds, ranges, order, end;

  Layout(const HopperAttentionArena& arena, int tile_rows, int64_t query_tiles) {
    const HopperAttentionBlock& block = arena.block;
    const auto chunks = std::max(static_cast<int64_t>(arena.chunks.size()), int64_t{1});
    tiles = query_tiles * block.batch;
    all_tiles = tiles * block.heads;
    int64_t at = 16;  // next, tail, finished
    const auto place = [&](int64_t count, size_t size) {
      const int64_t first = at;
      at += (count * static_cast<int64_t>(size) + 15) / 16 * 16;
      return first;
    };
    seen = place(all_tiles, sizeof(uint64_t));
    stored = place(all_tiles, sizeof(int));
    queue = place(chunks * all_tiles, sizeof(int));
    zeros_end = at;
    needed = place(tiles, sizeof(uint64_t));
    totals = place(tiles, sizeof(TileBounds));
    bounds = place(chunks * tiles, sizeof(TileBounds));
    ranges = place(chunks * tiles * tile_rows, sizeof(KeyRows));
    order = place(tiles, sizeof(int));
    end = at;
  }
};

bool Accepts(const HopperAttentionArena& arena, const HopperAttentionPartial& partial) {
  const HopperAttentionBlock& block = arena.block;
  if (!HopperAttentionAccepts(block) || partial.out.data == nullptr || !Aligned(partial.out) ||
      !Aligned(partial.result) || arena.chunks.size() > kMaxHopperArenaChunks || arena.patience_ms <= 0 ||
      arena.patience_ms > kMaxIndex || reinterpret_cast<uintptr_t>(arena.report) % 16 != 0) {
    return false;
  }
  for (const HopperArenaChunk& chunk : arena.chunks) {
    if (chunk.first_row < 0 || chunk.rows < 0 || chunk.rows > block.k_rows ||
        chunk.first_row > block.k_rows - chunk.rows || chunk.key_offset < 0 || chunk.key_stride < 1) {
      return false;
    }
  }
  const int64_t query_tiles = (block.q_rows + kSmallestTile - 1) / kSmallestTile;
  return query_tiles * block.batch * block.heads * static_cast<int64_t>(arena.chunks.size() + 2) < kMaxIndex;
}

}  // namespace

int64_t HopperAttentionForwardArenaWorkspaceBytes(const HopperAttentionArena& arena) {
  // As many tiles as the smallest make, each of the largest's rows.
  return Layout(arena, kLargestTile, (arena.block.q_rows + kSmallestTile - 1) / kSmallestTile).end;
}

cudaError_t FillArenaTables(const HopperAttentionArena& arena, int tile_rows, void* workspace,
                            HopperArenaArguments* arguments, cudaStream_t stream) {
  const int query_tiles = arguments->order.query_tiles;
  const Layout layout(arena, tile_rows, query_tiles);
  char* const base = static_cast<char*>(workspace);
  const auto at = [base]<typename T>(int64_t offset, T*) { return reinterpret_cast<T*>(base + offset); };
  int* const header = at(0, static_cast<int*>(nullptr));
  auto* const needed = at(layout.needed, static_cast<uint64_t*>(nullptr));
  auto* const totals = at(layout.totals, static_cast<TileBounds*>(nullptr));
  auto* const bounds = at(layout.bounds, static_cast<TileBounds*>(nullptr));
  auto* const ranges = at(layout.ranges, static_cast<KeyRows*>(nullptr));
  auto* const order = at(layout.order, static_cast<int*>(nullptr));
  arguments->tables = {ranges, bounds, order, header, query_tiles};
  arguments->state = {needed,
                      at(layout.seen, static_cast<uint64_t*>(nullptr)),
                      at(layout.stored, static_cast<int*>(nullptr)),
                      at(layout.queue, static_cast<int*>(nullptr)),
                      header,
                      header + 1,
                      header + 2};
  arguments->count = static_cast<int>(arena.chunks.size());
  arguments->patience_ns = arena.patience_ms * 1'000'000;
  arguments->report = reinterpret_cast<int4*>(arena.report);
  ArenaKeys keys{};
  keys.count = arguments->count;
  for (int c = 0; c < keys.count; ++c) {
    const HopperArenaChunk& chunk = arena.chunks[static_cast<size_t>(c)];
    keys.offset[c] = chunk.key_offset;
    keys.stride[c] = chunk.key_stride;
    keys.rows[c] = static_cast<int>(chunk.rows);
    arguments->chunks[c] = {chunk.arrived, chunk.awaited, static_cast<int>(chunk.first_row)};
    if (chunk.arrived == nullptr) arguments->arrived |= uint64_t{1} << c;
  }
  cudaError_t error = cudaMemsetAsync(base, 0, static_cast<size_t>(layout.zeros_end), stream);
  if (error != cudaSuccess) return error;
  error = LaunchKernel(FillChunkTables,
                       dim3(static_cast<unsigned>(query_tiles), static_cast<unsigned>(arena.block.batch)),
                       tile_rows, 0, stream, arena.block, keys, ranges, bounds, totals, needed);
  if (error != cudaSuccess) return error;
  return SortForwardTiles(totals, arena.block.batch, query_tiles, order, stream);
}

cudaError_t HopperAttentionForwardArena(const HopperAttentionArena& arena,
                                        const HopperAttentionPartial& partial, void* workspace,
                                        cudaStream_t stream) {
  const HopperAttentionBlock& block = arena.block;
  if (!Accepts(arena, partial) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (block.q_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  const auto launch = block.dim == 64    ? HopperArenaDim64
                      : block.dim == 128 ? HopperArenaDim128
                                         : HopperArenaDim192;
  HopperAttentionArena some = arena;
  const HopperArenaChunk no_rows;
  if (arena.chunks.empty()) some.chunks = {&no_rows, 1};  // where rows without keys find their range
  return launch(some, partial, workspace, stream);
}

}  // namespace annulus::kernels
