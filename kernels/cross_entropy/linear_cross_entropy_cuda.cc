// Per chunk of tokens: logits by one product, loss and in-place gradient row by row, then two products.

#include "kernels/cross_entropy/linear_cross_entropy_cuda.h"

#include <algorithm>
#include <type_traits>

#include "kernels/common/cuda_call.h"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
#include "kernels/cross_entropy/loss_scratch.h"

namespace annulus::kernels {
namespace {

CudaLossScratch LayOut(const CudaLinearCrossEntropyArgs& args) {
  return LayOutCudaLoss({.tokens = args.tokens,
                         .vocab = args.vocab,
                         .chunk_tokens = args.chunk_tokens,
                         .held = args.combine ? VocabularyHeld::kPart : VocabularyHeld::kWhole});
}

struct Chunk {
  int64_t begin, rows, stride;
  float *logits, *losses, *stats;
};

CudaCrossEntropyArgs KernelArgs(const CudaLinearCrossEntropyArgs& args, const Chunk& chunk) {
  return {.tokens = chunk.rows,
          .vocab = args.vocab,
          .stride = chunk.stride,
          .begin = args.begin,
          .scale = args.scale,
          .targets = args.targets + chunk.begin,
          .logits = chunk.logits,
          .row_loss = chunk.losses,
          .stats = chunk.stats};
}

absl::Status LossesOfPart(const CudaLinearCrossEntropyArgs& args, const Chunk& chunk, cudaStream_t stream) {
  const CudaCrossEntropyArgs kernel = KernelArgs(args, chunk);
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cross-entropy stats", CudaCrossEntropyStats(kernel, stream)));
  ANNULUS_RETURN_IF_ERROR(args.combine(chunk.stats, chunk.rows));
  ANNULUS_RETURN_IF_ERROR(CudaStatus(
      "sum of losses", CudaAddLossOfStats(chunk.stats, kernel.targets, chunk.rows, args.loss, stream)));
  if (args.part == CudaLossPart::kLoss) return absl::OkStatus();
  const cudaError_t error = args.operands == CudaElement::kF32
                                ? CudaCrossEntropyGradient<float>(kernel, stream)
                                : CudaCrossEntropyGradient<__nv_bfloat16>(kernel, stream);
  return CudaStatus("cross-entropy gradient", error);
}

absl::Status Losses(const CudaLinearCrossEntropyArgs& args, const Chunk& chunk, cudaStream_t stream) {
  const CudaCrossEntropyArgs kernel = KernelArgs(args, chunk);
  cudaError_t error = cudaSuccess;
  if (args.part == CudaLossPart::kLoss) {
    error = CudaCrossEntropyLoss(kernel, stream);
  } else if (args.operands == CudaElement::kF32) {
    error = CudaCrossEntropy<float>(kernel, stream);
  } else {
    error = CudaCrossEntropy<__nv_bfloat16>(kernel, stream);
  }
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cross-entropy", error));
  return CudaStatus("sum of losses", CudaAddSum(chunk.losses, chunk.rows, args.loss, stream));
}

template <typename Byte>
Byte* Rows(Byte* base, int64_t rows, int64_t row_bytes) {
  using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
  return static_cast<Char*>(base) + rows * row_bytes;
}

}  // namespace

int64_t CudaLinearCrossEntropyScratchBytes(const CudaLinearCrossEntropyArgs& args) {
  return LayOut(args).bytes;
}

absl::Status CudaLinearCrossEntropy(const CudaLinearCall& call, const CudaLinearCrossEntropyArgs& args) {
  if (args.vocab > kCudaCrossEntropyMaxVocab) {
    return Invalid("cross_entropy: vocab=", args.vocab, ": expected at most ", kCudaCrossEntropyMaxVocab,
                   " on GPUs");
  }
  const CudaLossScratch layout = LayOut(args);
  const int64_t x_row_bytes = args.d * SizeOf(args.operands);
  for (int64_t begin = 0; begin < args.tokens; begin += layout.chunk_rows) {
    char* const scratch = static_cast<char*>(args.scratch);
    const Chunk chunk{.begin = begin,
                      .rows = std::min(layout.chunk_rows, args.tokens - begin),
                      .stride = layout.stride,
                      .logits = reinterpret_cast<float*>(scratch + layout.losses_bytes + layout.stats_bytes),
                      .losses = reinterpret_cast<float*>(scratch),
                      .stats = reinterpret_cast<float*>(scratch + layout.losses_bytes)};
    const CudaLinearShape shape{.tokens = chunk.rows, .in = args.d, .out = args.vocab};
    const CudaMatrix x{Rows(args.x, begin, x_row_bytes), args.d}, w{args.w, args.d};
    ANNULUS_RETURN_IF_ERROR(CudaLinearForward(call, {.shape = shape,
                                                     .operands = args.operands,
                                                     .result = CudaElement::kF32,
                                                     .x = x,
                                                     .w = w,
                                                     .y = chunk.logits,
                                                     .y_stride = chunk.stride}));
    ANNULUS_RETURN_IF_ERROR(args.combine ? LossesOfPart(args, chunk, call.stream)
                                         : Losses(args, chunk, call.stream));
    if (args.part == CudaLossPart::kLoss) continue;
    // Gradient rows start where logit rows do.
    const CudaMatrix dlogits{chunk.logits, chunk.stride * SizeOf(CudaElement::kF32) / SizeOf(args.operands)};
    ANNULUS_RETURN_IF_ERROR(CudaLinearBackwardWeight(call, {.shape = shape,
                                                            .operands = args.operands,
                                                            .dy = dlogits,
                                                            .x = x,
                                                            .dw = args.dw,
                                                            .dw_stride = args.d}));
    ANNULUS_RETURN_IF_ERROR(CudaLinearBackwardInput(call, {.shape = shape,
                                                           .operands = args.operands,
                                                           .result = args.operands,
                                                           .dy = dlogits,
                                                           .w = w,
                                                           .dx = Rows(args.dx, begin, x_row_bytes),
                                                           .dx_stride = args.d}));
  }
  return absl::OkStatus();
}

}  // namespace annulus::kernels
