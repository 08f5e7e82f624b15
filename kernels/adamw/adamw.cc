#include "annulus/ops/adamw.h"

#include "kernels/adamw/adamw_kernels.h"
#include "kernels/common/arguments.h"

namespace annulus {
namespace {

absl::Status CheckHyper(const AdamWHyper& hyper) {
  if (hyper.step < 1) return Invalid("adamw.step=", hyper.step, ": expected at least 1");
  if (!(hyper.beta1 >= 0 && hyper.beta1 < 1))
    return Invalid("adamw.beta1=", hyper.beta1, ": expected in [0, 1)");
  if (!(hyper.beta2 >= 0 && hyper.beta2 < 1))
    return Invalid("adamw.beta2=", hyper.beta2, ": expected in [0, 1)");
  if (!(hyper.eps >= 0)) return Invalid("adamw.eps=", hyper.eps, ": expected at least 0");
  return absl::OkStatus();
}

}  // namespace

absl::Status AdamWUpdate(Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  const TensorRef& param = tensors.param;
  ANNULUS_RETURN_IF_ERROR(CheckHyper(hyper));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckFloat(ctx, "adamw.param", param));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "adamw.m", tensors.m, param.dtype(), param.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "adamw.v", tensors.v, param.dtype(), param.shape()));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "adamw.grad", tensors.grad, param.dtype(), param.shape()));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(param.dtype(),
                      [&]<class T>() { return kernels::AdamWUpdate<T>(device, hyper, tensors); });
  });
}

}  // namespace annulus
