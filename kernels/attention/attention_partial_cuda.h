#pragma once

// The CUDA passes around block attention, for kernels of every dtype: the reset of a partial result and the
// delta of the backward. Any strides; rows whose heads all start on 16 bytes move in vectors.

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::kernels {

// out = 0, lse = -inf: no keys seen.
struct CudaResetPartialArgs {
  int64_t rows = 0, batch = 0, heads = 0, v_dim = 0;
  CudaHeads<float> out;  // [rows, batch, heads, v_dim]
  float* lse = nullptr;  // [rows, batch, heads]
};
cudaError_t CudaResetPartial(const CudaResetPartialArgs& args, cudaStream_t stream);

// delta[rows, batch, heads] = sum over v_dim of out * dout, in f32.
template <typename T>
struct CudaAttentionDeltaArgs {
  int64_t rows = 0, batch = 0, heads = 0, v_dim = 0;
  CudaHeads<const T> out, dout;  // [rows, batch, heads, v_dim]
  float* delta = nullptr;
};
// T: float, __nv_bfloat16.
template <typename T>
cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<T>& args, cudaStream_t stream);

}  // namespace annulus::kernels
