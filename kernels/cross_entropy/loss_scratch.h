#pragma once

// How the logits of one chunk of tokens lie in scratch memory. Plain arithmetic, so that a machine without a
// GPU can tell how much memory a run on GPUs takes.

#include <cstdint>

#include "annulus/ops/cross_entropy.h"

namespace annulus::kernels {

// On GPUs: the losses of the chunk's tokens in f32, of a part of the vocabulary their stats as well, then the
// logits, rows `stride` elements apart.
struct CudaLossScratch {
  int64_t chunk_rows = 0, stride = 0, losses_bytes = 0, stats_bytes = 0, bytes = 0;
};
struct CudaLossShape {
  int64_t tokens = 0, vocab = 0, chunk_tokens = 0;
  VocabularyHeld held = VocabularyHeld::kWhole;
};
CudaLossScratch LayOutCudaLoss(const CudaLossShape& shape);

}  // namespace annulus::kernels
