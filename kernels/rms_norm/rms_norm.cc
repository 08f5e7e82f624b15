#include "annulus/ops/rms_norm.h"

#include "kernels/common/arguments.h"
#include "kernels/rms_norm/rms_norm_kernels.h"

namespace annulus {
namespace {

absl::Status CheckInputs(const Context& ctx, const ConstTensorRef& x, const ConstTensorRef& w, double eps) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "rms_norm.x", x));
  if (x.rank() != 2) return Invalid("rms_norm.x=", ToString(x.shape()), ": expected [tokens, d]");
  if (!(eps >= 0)) return Invalid("rms_norm.eps=", eps, ": expected at least 0");
  return kernels::CheckTensor(ctx, "rms_norm.w", w, x.dtype(), {x.dim(1)});
}

}  // namespace

absl::Status RmsNormForward(Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckInputs(ctx, x, w, eps));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rms_norm.y", y, x.dtype(), x.shape()));
  return VisitKernel(ctx, x.dtype(), [&]<class T>(auto device) {
    return kernels::RmsNormForward<T>(device, ctx, x, w, eps, y);
  });
}

absl::Status RmsNormBackward(Context& ctx, ConstTensorRef x, ConstTensorRef w, ConstTensorRef dy, double eps,
                             TensorRef dx, TensorRef dw) {
  ANNULUS_RETURN_IF_ERROR(CheckInputs(ctx, x, w, eps));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rms_norm.dy", dy, x.dtype(), x.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rms_norm.dx", dx, x.dtype(), x.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rms_norm.dw", dw, AccumOf(x.dtype()), w.shape()));
  return VisitKernel(ctx, x.dtype(), [&]<class T>(auto device) {
    return kernels::RmsNormBackward<T>(device, ctx, x, w, eps, {.dy = dy, .dx = dx, .dw = dw});
  });
}

}  // namespace annulus
