#pragma once

// CUDA kernels of annulus/ops/rms_norm.h, with the residual addition before the norm fused in.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// sum = x + residual, rounded to T;  y = w * sum / sqrt(mean(sum^2) + eps)
// Without a residual sum is x. The norm is of the rounded sum, which is what backward reads.
//   x, residual, sum, y: [tokens, d], rows contiguous   w: [d]. y and sum may be x or residual, not each
//   other.
template <typename T>
struct CudaRmsNormForwardArgs {
  int64_t tokens = 0, d = 0;
  double eps = 0;
  const T* x = nullptr;
  const T* residual = nullptr;  // optional
  const T* w = nullptr;
  T* sum = nullptr;  // only with a residual
  T* y = nullptr;
};
// d: at most 32768 (bf16) or 16384 (f32); at most 4096 where rows do not lie on 16 bytes.
template <typename T>
cudaError_t CudaRmsNormForward(const CudaRmsNormForwardArgs<T>& args, cudaStream_t stream);

// dx += the gradient through the norm of x, dw += the weight's, in an order fixed by the device and the
// shape. For a residual stream, x is the saved sum and dx the gradient that also passes beside the norm.
//   x, dy, dx: [tokens, d]   w, dw: [d]   scratch: CudaRmsNormScratch(d) floats
template <typename T>
struct CudaRmsNormBackwardArgs {
  int64_t tokens = 0, d = 0;
  double eps = 0;
  const T* x = nullptr;
  const T* w = nullptr;
  const T* dy = nullptr;
  T* dx = nullptr;
  float* dw = nullptr;
  float* scratch = nullptr;
};
// d: at most 16384 (bf16) or 8192 (f32); at most 2048 where rows do not lie on 16 bytes.
template <typename T>
cudaError_t CudaRmsNormBackward(const CudaRmsNormBackwardArgs<T>& args, cudaStream_t stream);
int64_t CudaRmsNormScratch(int64_t d);

}  // namespace annulus::kernels
