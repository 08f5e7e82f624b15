#include "annulus/ops/swiglu.h"

#include "kernels/common/arguments.h"
#include "kernels/swiglu/swiglu_kernels.h"

namespace annulus {
namespace {

absl::Status CheckGateUp(const Context& ctx, const ConstTensorRef& gate_up) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "swiglu.gate_up", gate_up));
  if (gate_up.rank() != 2 || gate_up.dim(1) % 2 != 0) {
    return Invalid("swiglu.gate_up=", ToString(gate_up.shape()), ": expected [tokens, 2 * d_ff]");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SwigluForward(Context& ctx, ConstTensorRef gate_up, TensorRef h) {
  ANNULUS_RETURN_IF_ERROR(CheckGateUp(ctx, gate_up));
  const Shape half{gate_up.dim(0), gate_up.dim(1) / 2};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "swiglu.h", h, gate_up.dtype(), half));
  return VisitKernel(ctx, h.dtype(), [&]<class T>(auto device) {
    return kernels::SwigluForward<T>(device, ctx, gate_up, h);
  });
}

absl::Status SwigluBackward(Context& ctx, ConstTensorRef gate_up, ConstTensorRef dh, TensorRef dgate_up) {
  ANNULUS_RETURN_IF_ERROR(CheckGateUp(ctx, gate_up));
  const Shape half{gate_up.dim(0), gate_up.dim(1) / 2};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "swiglu.dh", dh, gate_up.dtype(), half));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "swiglu.dgate_up", dgate_up, gate_up.dtype(), gate_up.shape()));
  return VisitKernel(ctx, dh.dtype(), [&]<class T>(auto device) {
    return kernels::SwigluBackward<T>(device, ctx, gate_up, dh, dgate_up);
  });
}

}  // namespace annulus
