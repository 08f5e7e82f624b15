#include "kernels/common/cuda_call.h"
#include "kernels/embedding/embedding_cuda.h"
#include "kernels/embedding/embedding_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status EmbeddingForward(CudaTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef table,
                              TensorRef y) {
  return CudaStatus("embedding forward",
                    CudaEmbeddingForward(tokens.dim(0), table.dim(1), CudaData<int32_t>(tokens),
                                         CudaData<T>(table), CudaData<T>(y), ctx.stream()));
}

template <typename T>
absl::Status EmbeddingBackward(CudaTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef dy,
                               TensorRef dtable) {
  const int64_t count = tokens.dim(0), vocab = dtable.dim(0), d = dtable.dim(1);
  ArenaScope scope(ctx.scratch);
  const int64_t bytes = CudaEmbeddingBackwardScratchBytes(count, d);
  const CudaEmbeddingBackwardArgs<CudaType<T>> args{
      .token_count = count,
      .d = d,
      .vocab = vocab,
      .tokens = CudaData<int32_t>(tokens),
      .dy = CudaData<T>(dy),
      .dtable = CudaData<float>(dtable),
      .scratch = ctx.scratch.Allocate(DType::kU8, {bytes}).raw()};
  return CudaStatus("embedding backward", CudaEmbeddingBackward(args, ctx.stream()));
}

template absl::Status EmbeddingForward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status EmbeddingForward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef,
                                                 TensorRef);
template absl::Status EmbeddingBackward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status EmbeddingBackward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef,
                                                  TensorRef);

}  // namespace annulus::kernels
