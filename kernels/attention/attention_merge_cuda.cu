// Floors, bytes per element of O: first block 6, later ones 10; LSE adds 8 or 12 per row and head.

#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kN = 4;     // elements a thread: 16 bytes of the carry
constexpr int kRows = 4;  // in flight per thread

__device__ const float* At(const float* base, const LseStrides& s, int64_t row, int64_t item, int64_t head) {
  return base + row * s.row + item * s.batch + head * s.head;
}

// Weights of block and carry in their sum.
struct Weights {
  float lse, block = 1, carry = 0;
};
__device__ Weights WeightsOf(float block_lse, float carry_lse) {
  if (carry_lse == -INFINITY) return {.lse = block_lse};
  const float top = fmaxf(carry_lse, block_lse);
  const float a = expf(carry_lse - top), b = expf(block_lse - top);
  return {.lse = top + logf(a + b), .block = b / (a + b), .carry = a / (a + b)};
}

// `lanes` threads, a power of two of one warp, share a head; a CTA takes neighbouring heads of the same kRows
// rows, so that it reads and writes long runs.
template <MergeMode kMode>
__global__ void __launch_bounds__(kThreads)
    MergeKernel(const MergeBlockArgs args, int lanes, uint32_t head_blocks) {
  constexpr bool kContinue = kMode == MergeMode::kContinue;
  const int64_t first = int64_t{blockIdx.x / head_blocks} * kRows;
  const int64_t head_item = int64_t{blockIdx.x % head_blocks} * (kThreads / lanes) + threadIdx.x / lanes;
  const bool inside = head_item < args.batch * args.heads;
  const int64_t item = head_item / args.heads, head = head_item % args.heads;
  const int lane = threadIdx.x % lanes;
  const bool holds = lane * kN < args.dim;
  const int64_t column = head * args.dim + lane * kN;
  const __nv_bfloat16* in = args.block_out + item * args.block_out_stride.batch + column;
  float* out = args.out + item * args.out_stride.batch + column;
  Pack<__nv_bfloat16, kN> block[kRows] = {};
  Pack<float, kN> carry[kRows] = {};
  float block_lse[kRows], carry_lse[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int64_t row = first + u;
    block_lse[u] = carry_lse[u] = -INFINITY;
    if (!inside || row >= args.rows) continue;
    block_lse[u] = *At(args.block_lse, args.block_lse_stride, row, item, head);
    if (kContinue) carry_lse[u] = *At(args.lse, args.lse_stride, row, item, head);
    if (!holds) continue;
    block[u] = LoadPack<kN>(in + row * args.block_out_stride.row);
    if (kContinue) carry[u] = LoadPack<kN>(static_cast<const float*>(out + row * args.out_stride.row));
  }
  __syncwarp();  // a row's threads have all read its LSE before one of them writes it
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int64_t row = first + u;
    const bool nothing = block_lse[u] == -INFINITY;
    // Nothing to add: the carry stays bit-identical.
    if (!inside || row >= args.rows || (nothing && carry_lse[u] != -INFINITY)) continue;
    const Weights weights = WeightsOf(block_lse[u], carry_lse[u]);
    float value[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      // Where LSE is -inf the output is defined as 0, whatever the memory holds.
      const float added = nothing ? 0.0f : weights.block * block[u][i];
      value[i] = weights.carry == 0.0f ? added : fmaf(weights.carry, carry[u][i], added);
    }
    if (holds) StorePack<kN>(PackOf<float>(value), out + row * args.out_stride.row);
    if (lane == 0) *const_cast<float*>(At(args.lse, args.lse_stride, row, item, head)) = weights.lse;
  }
}

// 32 x 32 tiles of (row, head) through shared memory, so that both sides are read and written in runs.
__global__ void __launch_bounds__(1024) CopyLseKernel(const CopyLseArgs args, int64_t row_tiles) {
  __shared__ float tile[32][33];
  const int64_t item = blockIdx.y;
  const int64_t row0 = blockIdx.x % row_tiles * 32, head0 = blockIdx.x / row_tiles * 32;
  const bool from_rows = args.from_stride.row <= args.from_stride.head;  // the row index varies fastest
  const bool to_rows = args.to_stride.row <= args.to_stride.head;
  const int x = threadIdx.x, y = threadIdx.y;
  const int in_row = from_rows ? x : y, in_head = from_rows ? y : x;
  if (row0 + in_row < args.rows && head0 + in_head < args.heads) {
    tile[in_row][in_head] = *At(args.from, args.from_stride, row0 + in_row, item, head0 + in_head);
  }
  __syncthreads();
  const int out_row = to_rows ? x : y, out_head = to_rows ? y : x;
  if (row0 + out_row < args.rows && head0 + out_head < args.heads) {
    *const_cast<float*>(At(args.to, args.to_stride, row0 + out_row, item, head0 + out_head)) =
        tile[out_row][out_head];
  }
}

int PowerOfTwoAtLeast(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace

cudaError_t CudaMergeBlock(const MergeBlockArgs& args, MergeMode mode, cudaStream_t stream) {
  const OutStrides &in = args.block_out_stride, &out = args.out_stride;
  if (args.dim % 8 != 0 || args.dim > 32 * kN || !Aligned(args.block_out) || !Aligned(args.out) ||
      in.row % 8 != 0 || out.row % 4 != 0 || (args.batch > 1 && (in.batch % 8 != 0 || out.batch % 4 != 0))) {
    return cudaErrorInvalidValue;
  }
  const int lanes = PowerOfTwoAtLeast(args.dim / kN);
  const int64_t head_blocks = CeilDiv(args.batch * args.heads, kThreads / lanes);
  const int64_t blocks = CeilDiv(args.rows, kRows) * head_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const auto grid = static_cast<uint32_t>(blocks);
  if (mode == MergeMode::kFirst) {
    MergeKernel<MergeMode::kFirst>
        <<<grid, kThreads, 0, stream>>>(args, lanes, static_cast<uint32_t>(head_blocks));
  } else {
    MergeKernel<MergeMode::kContinue>
        <<<grid, kThreads, 0, stream>>>(args, lanes, static_cast<uint32_t>(head_blocks));
  }
  return cudaGetLastError();
}

cudaError_t CudaCopyLse(const CopyLseArgs& args, cudaStream_t stream) {
  if (args.rows * args.batch * args.heads == 0) return cudaSuccess;
  const int64_t row_tiles = CeilDiv(args.rows, 32), head_tiles = CeilDiv(args.heads, 32);
  if (row_tiles * head_tiles > INT32_MAX || args.batch > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(row_tiles * head_tiles), static_cast<uint32_t>(args.batch));
  CopyLseKernel<<<grid, dim3(32, 32), 0, stream>>>(args, row_tiles);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
