#include "kernels/adamw/adamw_cuda.h"
#include "kernels/adamw/adamw_kernels.h"
#include "kernels/common/cuda_call.h"

namespace annulus::kernels {
namespace {

// T: of the copy
template <typename T>
absl::Status Update(Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  const CudaAdamWArgs<CudaType<T>> args{.elements = tensors.param.elements(),
                                        .lr = hyper.lr,
                                        .beta1 = hyper.beta1,
                                        .beta2 = hyper.beta2,
                                        .eps = hyper.eps,
                                        .weight_decay = hyper.weight_decay,
                                        .step = hyper.step,
                                        .gradient_scale = CudaData<double>(tensors.gradient_scale),
                                        .param = CudaData<float>(tensors.param),
                                        .m = CudaData<float>(tensors.m),
                                        .v = CudaData<float>(tensors.v),
                                        .grad = CudaData<float>(tensors.grad),
                                        .copy = tensors.copy.defined() ? CudaData<T>(tensors.copy) : nullptr};
  return CudaStatus("adamw", CudaAdamW(args, ctx.stream()));
}

}  // namespace

absl::Status AdamWUpdate(CudaTag, Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  if (tensors.copy.defined() && tensors.copy.dtype() == DType::kBF16) {
    return Update<BFloat16>(ctx, hyper, tensors);
  }
  return Update<float>(ctx, hyper, tensors);
}

}  // namespace annulus::kernels
