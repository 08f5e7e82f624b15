#include "kernels/common/cuda_call.h"
#include "kernels/rms_norm/rms_norm_cuda.h"
#include "kernels/rms_norm/rms_norm_kernels.h"

namespace annulus::kernels {
namespace {

// The launchers refuse rows that do not fit in the registers of a CTA.
absl::Status Status(cudaError_t error, absl::string_view what, const ConstTensorRef& x) {
  if (error != cudaErrorInvalidValue) return CudaStatus(what, error);
  return Invalid(
      "rms_norm.x=", Name(x.dtype()), ToString(x.shape()), " on ", ToString(x.device()),
      ": expected d of at most 64 KiB forward and 32 KiB backward, or of 4096 and 2048 elements where "
      "rows are not whole multiples of 16 bytes");
}

}  // namespace

template <typename T>
absl::Status RmsNormForward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                            TensorRef y) {
  const CudaRmsNormForwardArgs<CudaType<T>> args{.tokens = x.dim(0),
                                                 .d = x.dim(1),
                                                 .eps = eps,
                                                 .x = CudaData<T>(x),
                                                 .w = CudaData<T>(w),
                                                 .y = CudaData<T>(y)};
  return Status(CudaRmsNormForward(args, ctx.stream()), "rms_norm forward", x);
}

template <typename T>
absl::Status RmsNormBackward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps,
                             const RmsNormGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  const TensorRef scratch = ctx.scratch.Allocate(DType::kF32, {CudaRmsNormScratch(x.dim(1))});
  const CudaRmsNormBackwardArgs<CudaType<T>> args{.tokens = x.dim(0),
                                                  .d = x.dim(1),
                                                  .eps = eps,
                                                  .x = CudaData<T>(x),
                                                  .w = CudaData<T>(w),
                                                  .dy = CudaData<T>(gradients.dy),
                                                  .dx = CudaData<T>(gradients.dx),
                                                  .dw = CudaData<float>(gradients.dw),
                                                  .scratch = CudaData<float>(scratch)};
  return Status(CudaRmsNormBackward(args, ctx.stream()), "rms_norm backward", x);
}

template absl::Status RmsNormForward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                            TensorRef);
template absl::Status RmsNormForward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                               TensorRef);
template absl::Status RmsNormBackward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                             const RmsNormGradients&);
template absl::Status RmsNormBackward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, double,
                                                const RmsNormGradients&);

}  // namespace annulus::kernels
