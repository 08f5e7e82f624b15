// Floor of a merge, bytes per element of O: 2 or 4 for the block, 8 for the carry; LSE adds 12 per row and
// head.

#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kN = 4;  // elements a thread: 16 bytes of the carry
constexpr uint32_t kWarp = 32;

template <typename T>
__device__ T* At(const CudaLse<T>& lse, int64_t row, int64_t item, int64_t head) {
  return lse.data + row * lse.row_stride + item * lse.batch_stride + head * lse.head_stride;
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

// Where LSE is -inf the output is defined as 0, whatever the memory holds.
__device__ float Merged(const Weights& weights, float block_lse, float block, float carry) {
  const float added = block_lse == -INFINITY ? 0.0f : weights.block * block;
  return weights.carry == 0.0f ? added : fmaf(weights.carry, carry, added);
}

// Nothing to add: the carry stays bit-identical.
__device__ bool Stays(float block_lse, float carry_lse) {
  return block_lse == -INFINITY && carry_lse != -INFINITY;
}

// A thread does one vector of kN elements: with few registers each and so all threads that fit on the device,
// there are enough loads in flight. (Two vectors a thread: 85% of copy speed; four: 73%.) The vectors of a
// head, a power of two of at most 32, are those of neighbouring threads of one warp.
template <typename Block>
__global__ void __launch_bounds__(kThreads) MergeKernel(const __grid_constant__ MergeBlockArgs<Block> args,
                                                        uint32_t vectors, uint32_t vectors_per_row) {
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  const bool inside = vector < vectors;
  const uint32_t token = vector / vectors_per_row, column = vector % vectors_per_row * kN;
  const uint32_t batch = static_cast<uint32_t>(args.batch), row = token / batch, item = token % batch;
  const uint32_t dim = static_cast<uint32_t>(args.dim), head = column / dim;
  float* const out = args.out.data + row * args.out.row_stride + item * args.out.batch_stride + column;
  float* const lse = At(args.lse, row, item, head);
  Pack<Block, kN> block = {};
  Pack<float, kN> carry = {};
  float block_lse = -INFINITY, carry_lse = -INFINITY;
  if (inside) {
    block_lse = *At(args.block_lse, row, item, head);
    carry_lse = *lse;
    block = LoadPack<kN>(args.block_out.data + row * args.block_out.row_stride +
                         item * args.block_out.batch_stride + column);
    carry = LoadPack<kN>(static_cast<const float*>(out));
  }
  __syncwarp();  // all threads of a head have read its LSE before one of them writes it
  if (!inside || Stays(block_lse, carry_lse)) return;
  const Weights weights = WeightsOf(block_lse, carry_lse);
  float value[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) value[i] = Merged(weights, block_lse, block[i], carry[i]);
  StorePack<kN>(PackOf<float>(value), out);
  if (column % dim == 0) *lse = weights.lse;
}

// Any dim and alignment: a warp does one head of one row.
template <typename Block>
__global__ void __launch_bounds__(kThreads)
    MergeAnyKernel(const __grid_constant__ MergeBlockArgs<Block> args) {
  const int64_t stat = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (stat >= args.rows * args.batch * args.heads) return;  // all of a warp
  const int64_t head = stat % args.heads, token = stat / args.heads;
  const int64_t row = token / args.batch, item = token % args.batch;
  const Block* block = args.block_out.data + row * args.block_out.row_stride +
                       item * args.block_out.batch_stride + head * args.dim;
  float* const out =
      args.out.data + row * args.out.row_stride + item * args.out.batch_stride + head * args.dim;
  float* const lse = At(args.lse, row, item, head);
  const float block_lse = *At(args.block_lse, row, item, head), carry_lse = *lse;
  __syncwarp();  // all have read the LSE before it is written
  if (Stays(block_lse, carry_lse)) return;
  const Weights weights = WeightsOf(block_lse, carry_lse);
  for (int64_t i = threadIdx.x % kWarp; i < args.dim; i += kWarp) {
    out[i] = Merged(weights, block_lse, ToFloat(block[i]), out[i]);
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
  const int64_t stats = args.rows * args.batch * args.heads, vectors = stats * args.dim / kN;
  if (stats == 0) return cudaSuccess;
  const bool power_of_two = args.dim > 0 && (args.dim & (args.dim - 1)) == 0;
  if (power_of_two && args.dim >= kN && args.dim <= int64_t{kWarp} * kN && Fits(args.block_out) &&
      Fits(args.out) && vectors <= UINT32_MAX - kThreads) {
    const auto blocks = static_cast<uint32_t>(CeilDiv(vectors, kThreads));
    MergeKernel<<<blocks, kThreads, 0, stream>>>(args, static_cast<uint32_t>(vectors),
                                                 static_cast<uint32_t>(args.heads * args.dim / kN));
    return cudaGetLastError();
  }
  const int64_t blocks = CeilDiv(stats, kThreads / kWarp);
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
