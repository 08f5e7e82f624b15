#pragma once

// CUDA kernels of annulus/ops/cross_entropy.h: from one chunk's logits to its loss and, in place, their
// gradient.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// row_loss[t] = log sum exp(logits[t]) - logits[t, target[t]];  the row becomes scale * (softmax - onehot) in
// Grad, at the start of the row's own memory (of the same stride in bytes). Rows with a negative target: loss
// 0, gradient 0.
//   logits: [tokens, vocab], rows `stride` elements apart, a multiple of 8, on 16 bytes
//   Logit, Grad: (float, float), (float, bf16), (bf16, bf16)
template <typename Logit>
struct CudaCrossEntropyArgs {
  int64_t tokens = 0, vocab = 0, stride = 0;
  double scale = 1;
  const int32_t* targets = nullptr;  // [tokens], device memory
  Logit* logits = nullptr;
  float* row_loss = nullptr;  // [tokens]
};
template <typename Logit, typename Grad>
cudaError_t CudaCrossEntropy(const CudaCrossEntropyArgs<Logit>& args, cudaStream_t stream);
// The losses alone; logits stay.
template <typename Logit>
cudaError_t CudaCrossEntropyLoss(const CudaCrossEntropyArgs<Logit>& args, cudaStream_t stream);

// *sum += sum of x[0, count), in f64 and in a fixed order.
cudaError_t CudaAddSum(const float* x, int64_t count, double* sum, cudaStream_t stream);

}  // namespace annulus::kernels
