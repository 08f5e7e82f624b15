// Per chunk of tokens: logits by one product, loss and in-place gradient row by row, then two products.

#include "kernels/cross_entropy/linear_cross_entropy_cuda.h"

#include <algorithm>
#include <type_traits>

#include "kernels/cross_entropy/cross_entropy_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kRowElements = 64;  // logit rows are whole multiples of this: 128 bytes in bf16

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Scratch {
  int64_t chunk_rows, stride, losses_bytes, bytes;
};
Scratch LayOut(const CudaLinearCrossEntropyArgs& args) {
  Scratch s{};
  s.chunk_rows = std::max<int64_t>(1, std::min(args.chunk_tokens, args.tokens));
  s.stride = RoundUp(args.vocab, kRowElements);
  s.losses_bytes = RoundUp(s.chunk_rows * int64_t{sizeof(float)}, 256);
  s.bytes = s.losses_bytes + s.chunk_rows * s.stride * SizeOf(args.logits);
  return s;
}

struct Chunk {
  int64_t begin, rows, stride;
  void* logits;
  float* losses;
};

template <typename Logit, typename Grad>
cudaError_t LaunchLosses(const CudaLinearCrossEntropyArgs& args, const Chunk& chunk, cudaStream_t stream) {
  const CudaCrossEntropyArgs<Logit> kernel{.tokens = chunk.rows,
                                           .vocab = args.vocab,
                                           .stride = chunk.stride,
                                           .scale = args.scale,
                                           .targets = args.targets + chunk.begin,
                                           .logits = static_cast<Logit*>(chunk.logits),
                                           .row_loss = chunk.losses};
  const cudaError_t error = args.dx == nullptr ? CudaCrossEntropyLoss(kernel, stream)
                                               : CudaCrossEntropy<Logit, Grad>(kernel, stream);
  return error != cudaSuccess ? error : CudaAddSum(chunk.losses, chunk.rows, args.loss, stream);
}

absl::Status Losses(const CudaLinearCrossEntropyArgs& args, const Chunk& chunk, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  if (args.operands == CudaElement::kF32) {
    error = LaunchLosses<float, float>(args, chunk, stream);
  } else if (args.logits == CudaElement::kF32) {
    error = LaunchLosses<float, __nv_bfloat16>(args, chunk, stream);
  } else {
    error = LaunchLosses<__nv_bfloat16, __nv_bfloat16>(args, chunk, stream);
  }
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cross-entropy kernel: ", cudaGetErrorString(error)));
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
  if (args.operands == CudaElement::kF32 && args.logits != CudaElement::kF32) {
    return Invalid("cross_entropy.logits=bf16: expected f32 with f32 operands");
  }
  const Scratch layout = LayOut(args);
  const int64_t x_row_bytes = args.d * SizeOf(args.operands);
  for (int64_t begin = 0; begin < args.tokens; begin += layout.chunk_rows) {
    const Chunk chunk{.begin = begin,
                      .rows = std::min(layout.chunk_rows, args.tokens - begin),
                      .stride = layout.stride,
                      .logits = static_cast<char*>(args.scratch) + layout.losses_bytes,
                      .losses = static_cast<float*>(args.scratch)};
    const CudaLinearShape shape{.tokens = chunk.rows, .in = args.d, .out = args.vocab};
    const CudaMatrix x{Rows(args.x, begin, x_row_bytes), args.d}, w{args.w, args.d};
    ANNULUS_RETURN_IF_ERROR(CudaLinearForward(call, {.shape = shape,
                                                     .operands = args.operands,
                                                     .result = args.logits,
                                                     .x = x,
                                                     .w = w,
                                                     .y = chunk.logits,
                                                     .y_stride = chunk.stride}));
    ANNULUS_RETURN_IF_ERROR(Losses(args, chunk, call.stream));
    if (args.dx == nullptr) continue;
    // Gradient rows start where logit rows do.
    const CudaMatrix dlogits{chunk.logits, chunk.stride * SizeOf(args.logits) / SizeOf(args.operands)};
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
