#pragma once

// Output projection and cross-entropy on CUDA in chunks of tokens (annulus/ops/cross_entropy.h). Logits are
// f32, which loses nothing before the log-sum-exp; their gradient is rounded once to the operands' type.

#include <functional>

#include "kernels/linear/linear_cuda.h"

namespace annulus::kernels {

enum class CudaLossPart : uint8_t { kLoss, kLossAndGradients };

// *loss += sum of the counted tokens' losses in nats. With gradients: dx = scale * d(sum)/dx (overwritten),
// dw += scale * d(sum)/dw. Negative targets are not counted.
struct CudaLinearCrossEntropyArgs {
  int64_t tokens = 0, d = 0, vocab = 0, chunk_tokens = 0;
  CudaLossPart part = CudaLossPart::kLoss;
  CudaElement operands = CudaElement::kBf16;  // of x, w and dx
  double scale = 1;
  const void* x = nullptr;           // [tokens, d]
  const void* w = nullptr;           // [vocab, d]
  const int32_t* targets = nullptr;  // [tokens], device memory
  void* dx = nullptr;                // [tokens, d]
  float* dw = nullptr;               // [vocab, d]
  double* loss = nullptr;            // device scalar
  // Of a part of the vocabulary: its first target, and what replaces the stats of a chunk by those of the
  // whole, [rows, 2] on the device.
  int64_t begin = 0;
  std::function<absl::Status(float* stats, int64_t rows)> combine = {};
  void* scratch = nullptr;  // on 256 bytes, of the size asked for below
};
absl::Status CudaLinearCrossEntropy(const CudaLinearCall& call, const CudaLinearCrossEntropyArgs& args);
int64_t CudaLinearCrossEntropyScratchBytes(const CudaLinearCrossEntropyArgs& args);

}  // namespace annulus::kernels
