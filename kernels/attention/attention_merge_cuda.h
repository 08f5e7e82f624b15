#pragma once

// CUDA kernels around block attention whose results come out on their own, and perhaps in 16 bits: the carry
// (O, LSE) stays in f32.

#include <cuda_bf16.h>

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::kernels {

// LSE of [rows, batch, heads] with the strides of any order of dimensions.
template <typename T>
struct CudaLse {
  T* data = nullptr;
  int64_t row_stride = 0, batch_stride = 0, head_stride = 0;
};
// [rows, batch, heads], the order of the ops.
template <typename T>
CudaLse<T> RowsFirst(T* data, int64_t batch, int64_t heads) {
  return {data, batch * heads, heads, 1};
}
// [batch, heads, rows], the order of cuDNN.
template <typename T>
CudaLse<T> RowsLast(T* data, int64_t rows, int64_t heads) {
  return {data, 1, heads * rows, rows};
}

// Folds the partial result of a block over keys not seen before into the carry; exact up to f32 rounding of
// the weights, in any order. LSE is -inf where no key was allowed: a block without keys leaves the carry's
// bits, a carry without keys is not used.
template <typename Block>
struct MergeBlockArgs {
  int64_t rows = 0, batch = 1, heads = 0, dim = 0;
  CudaHeads<const Block> block_out;
  CudaLse<const float> block_lse;
  CudaHeads<float> out;
  CudaLse<float> lse;
};
// Block: float, __nv_bfloat16. At copy speed where dim is a power of two from 16 to 512 and rows are on 16
// bytes.
template <typename Block>
cudaError_t CudaMergeBlock(const MergeBlockArgs<Block>& args, cudaStream_t stream);

// to[row, batch, head] = from[row, batch, head].
struct CopyLseArgs {
  int64_t rows = 0, batch = 1, heads = 0;
  CudaLse<const float> from;
  CudaLse<float> to;
};
cudaError_t CudaCopyLse(const CopyLseArgs& args, cudaStream_t stream);

}  // namespace annulus::kernels
