#pragma once

// Launches of the forward on Hopper (attention_hopper_forward.cuh).

#include <algorithm>

#include "kernels/attention/attention_hopper_forward.cuh"
#include "kernels/common/tensor_map.h"

namespace annulus::kernels {

// Heads, counted over all items, that thread blocks work on at a time, so that they read keys and values from
// L2: tiles enough to keep all busy, of few heads; keys and values of at most half of L2.
inline int HeadsPerSet(const HopperAttentionBlock& block, int query_tiles) {
  constexpr int64_t kFewBytes = 8 << 20, kMostBytes = 24 << 20, kTiles = 512;
  const int64_t kv_bytes = std::max<int64_t>(block.k_rows * (block.dim + block.v_dim) * 2, 1),
                group = block.heads / block.kv_heads, group_tiles = group * query_tiles;
  const int64_t wanted = std::max(kFewBytes / kv_bytes, (kTiles + group_tiles - 1) / group_tiles),
                kv_heads = std::clamp<int64_t>(std::min(wanted, kMostBytes / kv_bytes), 1,
                                               block.batch * block.kv_heads);
  return static_cast<int>(kv_heads * group);
}

template <typename Tile, ForwardMode kMode, typename Arguments>
cudaError_t LaunchHopperForwardMode(const Arguments& arguments, cudaStream_t stream) {
  const auto kernel = AttentionForwardHopper<Tile, kMode, Arguments>;
  static_assert(kForwardSharedBytes<Tile, kMode> <= Tile::kSharedLimit);
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kForwardSharedBytes<Tile, kMode>);
  if (error != cudaSuccess) return error;
  return LaunchEarly(kernel, dim3(static_cast<unsigned>(std::min(multiprocessors, arguments.order.tiles))),
                     Tile::kThreads, kForwardSharedBytes<Tile, kMode>, stream, arguments);
}

// All but the tables.
template <typename Tile>
cudaError_t MakeForwardArguments(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                 HopperForwardArguments* arguments) {
  const auto panels = [&](const auto& x, int64_t rows, int64_t heads, int64_t dim) {
    return PanelsRef{x.data, rows, block.batch, heads * dim / 64, x.row_stride, x.batch_stride};
  };
  cudaError_t error = MakeTensorMap(panels(block.q, block.q_rows, block.heads, block.dim), Tile::kQueries,
                                    Tile::kDim / 64, &arguments->q);
  if (error != cudaSuccess) return error;
  // Without keys any memory will do for the masked ones.
  const auto k = block.k_rows > 0 ? panels(block.k, block.k_rows, block.kv_heads, block.dim)
                                  : panels(block.q, block.q_rows, block.heads, block.dim);
  const auto v = block.k_rows > 0 ? panels(block.v, block.k_rows, block.kv_heads, block.v_dim) : k;
  error = MakeTensorMap(k, Tile::kKeys, Tile::kDim / 64, &arguments->k);
  if (error != cudaSuccess) return error;
  error = MakeTensorMap(v, Tile::kKeys, Tile::kValueDim / 64, &arguments->v);
  if (error != cudaSuccess) return error;
  arguments->out = partial.out;
  arguments->result = partial.result;
  arguments->lse = partial.lse;
  arguments->q_rows = static_cast<int>(block.q_rows);
  arguments->k_rows = static_cast<int>(block.k_rows);
  arguments->batch = static_cast<int>(block.batch);
  arguments->all_heads = static_cast<int>(block.batch * block.heads);
  arguments->heads_per_kv = static_cast<int>(block.heads / block.kv_heads);
  arguments->scale = block.scale * kLog2E;
  const int query_tiles = static_cast<int>((block.q_rows + Tile::kQueries - 1) / Tile::kQueries);
  arguments->order = {HeadsPerSet(block, query_tiles), static_cast<int>(block.heads), query_tiles,
                      query_tiles * arguments->all_heads};
  return cudaSuccess;
}

template <typename Tile>
cudaError_t LaunchHopperForward(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                void* workspace, cudaStream_t stream) {
  HopperForwardArguments arguments{};
  cudaError_t error = FillForwardTables(block, Tile::kQueries, workspace, &arguments.tables, stream);
  if (error != cudaSuccess) return error;
  error = MakeForwardArguments<Tile>(block, partial, &arguments);
  if (error != cudaSuccess) return error;
  return partial.out.data == nullptr ? LaunchHopperForwardMode<Tile, ForwardMode::kWhole>(arguments, stream)
                                     : LaunchHopperForwardMode<Tile, ForwardMode::kCarry>(arguments, stream);
}

template <typename Tile>
HopperForwardKernel ForwardKernelOf() {
  const auto whole = AttentionForwardHopper<Tile, ForwardMode::kWhole, HopperForwardArguments>;
  const auto carry = AttentionForwardHopper<Tile, ForwardMode::kCarry, HopperForwardArguments>;
  return {LaunchHopperForward<Tile>, reinterpret_cast<const void*>(whole),
          reinterpret_cast<const void*>(carry)};
}

}  // namespace annulus::kernels
