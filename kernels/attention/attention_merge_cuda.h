#pragma once

// CUDA kernels around block attention whose results come out in 16 bits: the carry (O, LSE) stays in f32.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// O: [rows, batch, heads, dim], heads and dim contiguous.  LSE: [rows, batch, heads] in any order of
// dimensions.
struct OutStrides {
  int64_t row = 0, batch = 0;
};
struct LseStrides {
  int64_t row = 0, batch = 0, head = 0;
};

// The order in which cuDNN keeps its statistics, [batch, heads, rows].
inline LseStrides PackedStats(int64_t rows, int64_t heads) {
  return {.row = 1, .batch = heads * rows, .head = rows};
}

// Folds the partial result of a block over keys not seen before into the carry; exact up to f32 rounding of
// the weights, in any order. LSE is -inf where no key was allowed.
struct MergeBlockArgs {
  int64_t rows = 0, batch = 1, heads = 0, dim = 0;
  const __nv_bfloat16* block_out = nullptr;
  OutStrides block_out_stride;
  const float* block_lse = nullptr;
  LseStrides block_lse_stride;
  float* out = nullptr;
  OutStrides out_stride;
  float* lse = nullptr;
  LseStrides lse_stride;
};
// kFirst: the carry holds nothing yet and is not read.
enum class MergeMode { kFirst, kContinue };
// dim: a multiple of 8 on rows of 16 bytes, at most 128.
cudaError_t CudaMergeBlock(const MergeBlockArgs& args, MergeMode mode, cudaStream_t stream);

// to[row, batch, head] = from[row, batch, head]: for a backward that wants another order than the carry's.
struct CopyLseArgs {
  int64_t rows = 0, batch = 1, heads = 0;
  const float* from = nullptr;
  LseStrides from_stride;
  float* to = nullptr;
  LseStrides to_stride;
};
cudaError_t CudaCopyLse(const CopyLseArgs& args, cudaStream_t stream);

}  // namespace annulus::kernels
