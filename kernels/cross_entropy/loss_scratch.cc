#include "kernels/cross_entropy/loss_scratch.h"

#include <algorithm>

#include "annulus/device/buffer.h"

namespace annulus {
namespace kernels {
namespace {

constexpr int64_t kRowElements = 64;  // logit rows are whole multiples of this: 256 bytes

// On CPUs a chunk's logits are read back right after they are written: at a small vocabulary 1024 rows stay
// in cache. At a large one 64 MiB in f32 bound the scratch, and 128 rows (at 128K) still amortise packing w.
constexpr int64_t kMaxCpuChunkRows = 1024;
constexpr int64_t kMaxCpuChunkLogits = int64_t{1} << 24;

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

CudaLossScratch LayOutCudaLoss(const CudaLossShape& shape) {
  CudaLossScratch s;
  s.chunk_rows = std::max<int64_t>(1, std::min(shape.chunk_tokens, shape.tokens));
  s.stride = RoundUp(shape.vocab, kRowElements);
  s.losses_bytes = RoundUp(s.chunk_rows * static_cast<int64_t>(sizeof(float)), kAlignmentBytes);
  if (shape.held == VocabularyHeld::kPart) {
    s.stats_bytes = RoundUp(s.chunk_rows * 2 * static_cast<int64_t>(sizeof(float)), kAlignmentBytes);
  }
  s.bytes = s.losses_bytes + s.stats_bytes + s.chunk_rows * s.stride * static_cast<int64_t>(sizeof(float));
  return s;
}

}  // namespace kernels

int64_t CpuLossChunkTokens(int64_t chunk_tokens, int64_t vocab) {
  const int64_t bounded = kernels::kMaxCpuChunkLogits / std::max<int64_t>(vocab, 1);
  return std::max<int64_t>(1, std::min({chunk_tokens, bounded, kernels::kMaxCpuChunkRows}));
}

int64_t LinearCrossEntropyScratchBytes(DeviceKind device, DType dtype, int64_t tokens, int64_t vocab,
                                       VocabularyHeld held) {
  if (device == DeviceKind::kCuda) {
    const kernels::CudaLossScratch scratch = kernels::LayOutCudaLoss(
        {.tokens = tokens, .vocab = vocab, .chunk_tokens = kLossChunkTokens, .held = held});
    return kernels::RoundUp(scratch.bytes, kAlignmentBytes);
  }
  const int64_t rows = std::min(CpuLossChunkTokens(kLossChunkTokens, vocab), tokens);
  const auto bytes_of = [&](int64_t columns) {
    return kernels::RoundUp(rows * columns * SizeOf(dtype), kAlignmentBytes);
  };
  return bytes_of(vocab) + (held == VocabularyHeld::kPart ? bytes_of(2) + bytes_of(1) : 0);
}

}  // namespace annulus
