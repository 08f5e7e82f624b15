#pragma once

// CUDA kernels of annulus/ops/cross_entropy.h: from one chunk's logits to its loss and, in place, their
// gradient. Of a part of the vocabulary in two steps, between which the stats of all parts are combined.
// Clusters of CTAs from compute capability 9.0, CTAs alone before.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// A row lies in the shared memory of a cluster: 16 times 112 KiB.
inline constexpr int64_t kCudaCrossEntropyMaxVocab = 458752;

// row_loss[t] = log sum exp(logits[t]) - logits[t, target[t]];  the row becomes scale * (softmax - onehot) in
// Grad, at the start of the row's own memory (of the same stride in bytes). Rows with a negative target: loss
// 0, gradient 0.
//   logits: [tokens, vocab], rows `stride` elements apart, a multiple of 8, on 16 bytes
//   Grad: float, __nv_bfloat16
struct CudaCrossEntropyArgs {
  int64_t tokens = 0, vocab = 0, stride = 0;
  int64_t begin = 0;  // of a part: the target that is its first logit
  double scale = 1;
  const int32_t* targets = nullptr;  // [tokens], device memory
  float* logits = nullptr;
  float* row_loss = nullptr;  // [tokens]; of the whole vocabulary
  float* stats = nullptr;     // [tokens, 2]; of a part
};
template <typename Grad>
cudaError_t CudaCrossEntropy(const CudaCrossEntropyArgs& args, cudaStream_t stream);
// The losses alone; logits stay.
cudaError_t CudaCrossEntropyLoss(const CudaCrossEntropyArgs& args, cudaStream_t stream);

// Of a part: stats[t] = log sum exp(logits[t]) and the target's logit, 0 where it is in another part; logits
// stay.
cudaError_t CudaCrossEntropyStats(const CudaCrossEntropyArgs& args, cudaStream_t stream);
// Of a part, with the whole vocabulary's stats: the row becomes its gradient.
template <typename Grad>
cudaError_t CudaCrossEntropyGradient(const CudaCrossEntropyArgs& args, cudaStream_t stream);
// *sum += the loss of the counted tokens by the whole vocabulary's stats, in f64 and in a fixed order.
cudaError_t CudaAddLossOfStats(const float* stats, const int32_t* targets, int64_t tokens, double* sum,
                               cudaStream_t stream);
// stats: [tokens, 2] of the whole vocabulary from those of its parts, [count, tokens, 2], in their order.
cudaError_t CudaMergeVocabularyStats(const float* parts, int64_t count, int64_t tokens, float* stats,
                                     cudaStream_t stream);

// *sum += sum of x[0, count), in f64 and in a fixed order.
cudaError_t CudaAddSum(const float* x, int64_t count, double* sum, cudaStream_t stream);

}  // namespace annulus::kernels
