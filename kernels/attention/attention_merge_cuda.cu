// Floor of a merge, bytes per element of O: 2 or 4 for the block, 8 for the carry; LSE adds 12 per row and
// head.

#include <bit>

#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {
namespace {

constexpr uint32_t kWarp = 32;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kN = 4;       // elements of a vector: 16 bytes of the carry
constexpr int kUnroll = 4;  // vectors of a lane, all in flight
constexpr uint32_t kWarpElements = kWarp * kUnroll * kN;

template <typename T>
__device__ T* At(const CudaLse<T>& lse, int64_t row, int64_t item, int64_t head) {
  return lse.data + row * lse.row_stride + item * lse.batch_stride + head * lse.head_stride;
}
template <typename T>
__device__ T* At(const CudaHeads<T>& x, int64_t row, int64_t item) {
  return x.data + row * x.row_stride + item * x.batch_stride;
}

// Weights of block and carry in their sum. What has the weight 0 is not used, whatever the memory holds:
// where LSE is -inf the output is defined as 0.
struct Weights {
  float lse, block, carry;

  // Nothing to add: the carry's bits stay.
  __device__ bool KeepCarry() const { return block == 0.0f && carry == 1.0f; }
  __device__ float Merge(float of_block, float of_carry) const {
    const float added = block == 0.0f ? 0.0f : block * of_block;
    return carry == 0.0f ? added : fmaf(carry, of_carry, added);
  }
};
__device__ Weights WeightsOf(float block_lse, float carry_lse) {
  if (block_lse == -INFINITY && carry_lse == -INFINITY) return {-INFINITY, 0, 0};
  const float ratio = expf(-fabsf(block_lse - carry_lse));  // of the smaller sum to the larger; NaN stays NaN
  const float larger = 1 / (1 + ratio), smaller = ratio * larger;
  const bool block_leads = block_lse > carry_lse;
  return {.lse = fmaxf(block_lse, carry_lse) + log1pf(ratio),
          .block = block_leads ? larger : smaller,
          .carry = block_leads ? smaller : larger};
}

// How heads are shared out: a warp takes `heads` neighbouring heads of a token, kWarpElements elements, and a
// CTA the same heads of kWarps tokens, so that LSE of either order is read in runs.
struct HeadGroups {
  uint32_t heads, count;  // of a group; groups of a token
  int vector_bits;        // log2 of the vectors of a head
};

// Weights cost more than the sums that they are for, so a lane forms those of one head for the whole warp.
template <typename Block>
__global__ void __launch_bounds__(kThreads)
    MergeKernel(const __grid_constant__ MergeBlockArgs<Block> args, HeadGroups groups) {
  const uint32_t lane = threadIdx.x % kWarp, group = blockIdx.x % groups.count;
  const int64_t token = int64_t{blockIdx.x / groups.count} * kWarps + threadIdx.x / kWarp;
  if (token >= args.rows * args.batch) return;  // all of a warp
  const auto batch = static_cast<uint32_t>(args.batch);
  const uint32_t row = static_cast<uint32_t>(token) / batch, item = static_cast<uint32_t>(token) % batch;
  const uint32_t first_head = group * groups.heads;
  const uint32_t heads = min(groups.heads, static_cast<uint32_t>(args.heads) - first_head);
  const int64_t first_column = first_head * args.dim + lane * kN;
  const Block* const block_out = At(args.block_out, row, item) + first_column;
  float* const out = At(args.out, row, item) + first_column;
  const auto head_of = [&](int u) { return (u * kWarp + lane) >> groups.vector_bits; };

  float block_lse = 0, carry_lse = 0;
  if (lane < heads) {
    block_lse = *At(args.block_lse, row, item, first_head + lane);
    carry_lse = *At(args.lse, row, item, first_head + lane);
  }
  Pack<Block, kN> block[kUnroll];
  Pack<float, kN> carry[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (head_of(u) >= heads) continue;
    block[u] = LoadPack<kN>(block_out + u * kWarp * kN);
    carry[u] = LoadPack<kN>(static_cast<const float*>(out + u * kWarp * kN));
  }
  const Weights own = WeightsOf(block_lse, carry_lse);
  if (lane < heads && !own.KeepCarry()) *At(args.lse, row, item, first_head + lane) = own.lse;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Weights weights = {.lse = 0,
                             .block = __shfl_sync(0xffffffffu, own.block, head_of(u)),
                             .carry = __shfl_sync(0xffffffffu, own.carry, head_of(u))};
    if (head_of(u) >= heads || weights.KeepCarry()) continue;
    float value[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) value[i] = weights.Merge(block[u][i], carry[u][i]);
    StorePack<kN>(PackOf<float>(value), out + u * kWarp * kN);
  }
}

// Any dim and alignment: a warp does one head of one row.
template <typename Block>
__global__ void __launch_bounds__(kThreads)
    MergeAnyKernel(const __grid_constant__ MergeBlockArgs<Block> args) {
  const int64_t stat = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (stat >= args.rows * args.batch * args.heads) return;  // all of a warp
  const int64_t head = stat % args.heads, token = stat / args.heads;
  const int64_t row = token / args.batch, item = token % args.batch;
  const Block* block = At(args.block_out, row, item) + head * args.dim;
  float* const out = At(args.out, row, item) + head * args.dim;
  float* const lse = At(args.lse, row, item, head);
  const Weights weights = WeightsOf(*At(args.block_lse, row, item, head), *lse);
  __syncwarp();  // all have read the LSE before it is written
  if (weights.KeepCarry()) return;
  for (int64_t i = threadIdx.x % kWarp; i < args.dim; i += kWarp) {
    out[i] = weights.Merge(ToFloat(block[i]), out[i]);
  }
  if (threadIdx.x % kWarp == 0) *lse = weights.lse;
}

// 32 x 32 tiles of (row, head) through shared memory, so that both sides are read and written in runs.
__global__ void __launch_bounds__(1024)
    CopyLseKernel(const __grid_constant__ CopyLseArgs args, int64_t row_tiles) {
  __shared__ float tile[32][33];
  const int64_t item = blockIdx.y;
  const int64_t row0 = blockIdx.x % row_tiles * 32, head0 = blockIdx.x / row_tiles * 32;
  const bool from_rows = args.from.row_stride <= args.from.head_stride;  // the row index varies fastest
  const bool to_rows = args.to.row_stride <= args.to.head_stride;
  const int x = threadIdx.x, y = threadIdx.y;
  const int in_row = from_rows ? x : y, in_head = from_rows ? y : x;
  if (row0 + in_row < args.rows && head0 + in_head < args.heads) {
    tile[in_row][in_head] = *At(args.from, row0 + in_row, item, head0 + in_head);
  }
  __syncthreads();
  const int out_row = to_rows ? x : y, out_head = to_rows ? y : x;
  if (row0 + out_row < args.rows && head0 + out_head < args.heads) {
    *At(args.to, row0 + out_row, item, head0 + out_head) = tile[out_row][out_head];
  }
}

template <typename T>
bool Fits(const CudaHeads<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (kN * sizeof(T)) == 0 && x.row_stride % kN == 0 &&
         x.batch_stride % kN == 0;
}

}  // namespace

template <typename Block>
cudaError_t CudaMergeBlock(const MergeBlockArgs<Block>& args, cudaStream_t stream) {
  const int64_t tokens = args.rows * args.batch, stats = tokens * args.heads;
  if (stats == 0) return cudaSuccess;
  const auto dim = static_cast<uint64_t>(args.dim);
  if (std::has_single_bit(dim) && dim >= kWarpElements / kWarp && dim <= kWarpElements &&
      Fits(args.block_out) && Fits(args.out)) {
    HeadGroups groups = {.heads = static_cast<uint32_t>(kWarpElements / dim),
                         .count = 0,
                         .vector_bits = std::countr_zero(dim / kN)};
    groups.count = static_cast<uint32_t>(CeilDiv(args.heads, groups.heads));
    const int64_t blocks = CeilDiv(tokens, kWarps) * groups.count;
    if (blocks > INT32_MAX || tokens > UINT32_MAX) return cudaErrorInvalidValue;
    MergeKernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(args, groups);
    return cudaGetLastError();
  }
  const int64_t blocks = CeilDiv(stats, kWarps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  MergeAnyKernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t CudaMergeBlock(const MergeBlockArgs<float>&, cudaStream_t);
template cudaError_t CudaMergeBlock(const MergeBlockArgs<__nv_bfloat16>&, cudaStream_t);

cudaError_t CudaCopyLse(const CopyLseArgs& args, cudaStream_t stream) {
  if (args.rows * args.batch * args.heads == 0) return cudaSuccess;
  const int64_t row_tiles = CeilDiv(args.rows, 32), head_tiles = CeilDiv(args.heads, 32);
  if (row_tiles * head_tiles > INT32_MAX || args.batch > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(row_tiles * head_tiles), static_cast<uint32_t>(args.batch));
  CopyLseKernel<<<grid, dim3(32, 32), 0, stream>>>(args, row_tiles);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
