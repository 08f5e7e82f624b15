#include "annulus/ops/relu_squared.h"

#include "kernels/common/arguments.h"
#include "kernels/relu_squared/relu_squared_kernels.h"

namespace annulus {
namespace {

absl::Status CheckX(const Context& ctx, const ConstTensorRef& x) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "relu_squared.x", x));
  if (x.rank() == 2) return absl::OkStatus();
  return Invalid("relu_squared.x=", ToString(x.shape()), ": expected [tokens, d_ff]");
}

}  // namespace

absl::Status ReluSquaredForward(Context& ctx, ConstTensorRef x, TensorRef h) {
  ANNULUS_RETURN_IF_ERROR(CheckX(ctx, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "relu_squared.h", h, x.dtype(), x.shape()));
  return VisitKernel(ctx, x.dtype(),
                     [&]<class T>(auto device) { return kernels::ReluSquaredForward<T>(device, ctx, x, h); });
}

absl::Status ReluSquaredBackward(Context& ctx, ConstTensorRef x, ConstTensorRef dh, TensorRef dx) {
  ANNULUS_RETURN_IF_ERROR(CheckX(ctx, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "relu_squared.dh", dh, x.dtype(), x.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "relu_squared.dx", dx, x.dtype(), x.shape()));
  return VisitKernel(ctx, x.dtype(), [&]<class T>(auto device) {
    return kernels::ReluSquaredBackward<T>(device, ctx, x, dh, dx);
  });
}

}  // namespace annulus
