#include <type_traits>

#include "kernels/common/cuda_call.h"
#include "kernels/common/cuda_libraries.h"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
#include "kernels/cross_entropy/cross_entropy_kernels.h"
#include "kernels/cross_entropy/linear_cross_entropy_cuda.h"

namespace annulus::kernels {

template <typename T>
absl::Status LinearCrossEntropy(CudaTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                const LinearCrossEntropyGradients* gradients, TensorRef loss) {
  CudaLinearCrossEntropyArgs launch{
      .tokens = args.x.dim(0),
      .d = args.x.dim(1),
      .vocab = args.w.dim(0),
      .chunk_tokens = args.chunk_tokens,
      .operands = std::is_same_v<T, BFloat16> ? CudaElement::kBf16 : CudaElement::kF32,
      .x = CudaData<T>(args.x),
      .w = CudaData<T>(args.w),
      .targets = CudaData<int32_t>(args.targets),
      .loss = CudaData<double>(loss),
      .begin = args.part.begin};
  if (args.part.combine) {
    launch.combine = [&](float* stats, int64_t rows) {
      return args.part.combine(TensorRef(stats, DType::kF32, ctx.device, {rows, 2}));
    };
  }
  if (gradients != nullptr) {
    launch.scale = gradients->scale;
    launch.dx = CudaData<T>(gradients->dx);
    launch.dw = CudaData<float>(gradients->dw);
    launch.part = CudaLossPart::kLossAndGradients;
  }
  ArenaScope scope(ctx.scratch);
  launch.scratch = ctx.scratch.Allocate(DType::kU8, {CudaLinearCrossEntropyScratchBytes(launch)}).raw();
  return CudaLinearCrossEntropy(LibrariesOf(ctx).Linear(ctx), launch);
}

absl::Status MergeVocabularyStats(CudaTag, Context& ctx, ConstTensorRef parts, TensorRef stats) {
  return CudaStatus("merged stats of a vocabulary",
                    CudaMergeVocabularyStats(CudaData<float>(parts), parts.dim(0), stats.dim(0),
                                             CudaData<float>(stats), ctx.stream()));
}

template absl::Status LinearCrossEntropy<float>(CudaTag, Context&, const annulus::LinearCrossEntropy&,
                                                const LinearCrossEntropyGradients*, TensorRef);
template absl::Status LinearCrossEntropy<BFloat16>(CudaTag, Context&, const annulus::LinearCrossEntropy&,
                                                   const LinearCrossEntropyGradients*, TensorRef);

}  // namespace annulus::kernels
