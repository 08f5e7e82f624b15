#pragma once

// CUDA kernels of annulus/ops/embedding.h. Tokens lie below vocab: the caller has checked them. Negative ones
// are of another rank.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// y[t] = table[tokens[t]], zeros for negative tokens   table: [vocab, d]   y: [tokens, d]
template <typename T>
cudaError_t CudaEmbeddingForward(int64_t token_count, int64_t d, const int32_t* tokens, const T* table, T* y,
                                 cudaStream_t stream);

// dtable[tokens[t]] += dy[t] in f32 where the token is not negative, the same bits on every run: occurrences
// of a token are summed in order of t within fixed pieces.
//   dy: [tokens, d]   dtable: [vocab, d] f32   scratch: on 256 bytes, of the size asked for below
template <typename T>
struct CudaEmbeddingBackwardArgs {
  int64_t token_count = 0, d = 0, vocab = 0;
  const int32_t* tokens = nullptr;
  const T* dy = nullptr;
  float* dtable = nullptr;
  void* scratch = nullptr;
};
template <typename T>
cudaError_t CudaEmbeddingBackward(const CudaEmbeddingBackwardArgs<T>& args, cudaStream_t stream);
int64_t CudaEmbeddingBackwardScratchBytes(int64_t token_count, int64_t d);

}  // namespace annulus::kernels
