#include "annulus/ops/adamw.h"

#include "kernels/adamw/adamw_kernels.h"
#include "kernels/common/arguments.h"

namespace annulus {
namespace {

using kernels::CheckTensor;

absl::Status CheckHyper(const AdamWHyper& hyper) {
  if (hyper.step < 1) return Invalid("adamw.step=", hyper.step, ": expected at least 1");
  if (!(hyper.beta1 >= 0 && hyper.beta1 < 1))
    return Invalid("adamw.beta1=", hyper.beta1, ": expected in [0, 1)");
  if (!(hyper.beta2 >= 0 && hyper.beta2 < 1))
    return Invalid("adamw.beta2=", hyper.beta2, ": expected in [0, 1)");
  if (!(hyper.eps >= 0)) return Invalid("adamw.eps=", hyper.eps, ": expected at least 0");
  return absl::OkStatus();
}

absl::Status CheckTensors(const Context& ctx, const AdamWTensors& t) {
  const DType dtype = t.param.dtype();
  const Shape& shape = t.param.shape();
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "adamw.param", t.param));
  if (dtype != AccumOf(dtype)) {
    return Invalid("adamw.param=", Name(dtype), ToString(shape), ": expected ", Name(AccumOf(dtype)));
  }
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "adamw.m", t.m, dtype, shape));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "adamw.v", t.v, dtype, shape));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "adamw.grad", t.grad, dtype, shape));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "adamw.gradient_scale", t.gradient_scale, DType::kF64, {1}));
  if (!t.copy.defined()) return absl::OkStatus();
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "adamw.copy", t.copy));
  return CheckTensor(ctx, "adamw.copy", t.copy, t.copy.dtype(), shape);
}

}  // namespace

absl::Status AdamWUpdate(Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors) {
  ANNULUS_RETURN_IF_ERROR(CheckHyper(hyper));
  ANNULUS_RETURN_IF_ERROR(CheckTensors(ctx, tensors));
  return VisitDevice(ctx, [&](auto device) { return kernels::AdamWUpdate(device, ctx, hyper, tensors); });
}

}  // namespace annulus
