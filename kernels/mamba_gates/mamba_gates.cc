#include "annulus/ops/mamba_gates.h"

#include "kernels/common/arguments.h"
#include "kernels/mamba_gates/mamba_gates_kernels.h"

namespace annulus {
namespace {

absl::Status CheckGates(const Context& ctx, const MambaGates& gates) {
  const ConstMatrixRef& raw = gates.raw;
  if (!kernels::IsCompute(ctx, raw.dtype)) {
    return Invalid("mamba_gates.raw.dtype=", Name(raw.dtype), ": expected ", kernels::ComputeNames(ctx));
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("mamba_gates.raw", raw, raw.dtype, raw.rows, raw.cols));
  const DType accum = AccumOf(raw.dtype);
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.bias", gates.bias, accum, Shape{raw.cols}));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "mamba_gates.a_log", gates.a_log, accum, Shape{raw.cols}));
  if (!(gates.low >= 0)) return Invalid("mamba_gates.low=", gates.low, ": expected at least 0");
  if (!(gates.high == 0 || gates.high >= gates.low)) {
    return Invalid("mamba_gates.high=", gates.high, ": expected 0 or at least low=", gates.low);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MambaGatesForward(Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a) {
  ANNULUS_RETURN_IF_ERROR(CheckGates(ctx, gates));
  const DType accum = AccumOf(gates.raw.dtype);
  const Shape shape{gates.raw.rows, gates.raw.cols};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.dt", dt, accum, shape));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.a", a, accum, shape));
  return VisitKernel(ctx, gates.raw.dtype, [&]<class T>(auto device) {
    return kernels::MambaGatesForward<T>(device, ctx, gates, dt, a);
  });
}

absl::Status MambaGatesBackward(Context& ctx, const MambaGates& gates, ConstTensorRef ddt, ConstTensorRef da,
                                MatrixRef draw, TensorRef dbias, TensorRef da_log) {
  ANNULUS_RETURN_IF_ERROR(CheckGates(ctx, gates));
  const DType accum = AccumOf(gates.raw.dtype);
  const int64_t tokens = gates.raw.rows, heads = gates.raw.cols;
  const Shape shape{tokens, heads};
  if (ddt.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.ddt", ddt, accum, shape));
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.da", da, accum, shape));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("mamba_gates.draw", draw, gates.raw.dtype, tokens, heads));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.dbias", dbias, accum, Shape{heads}));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "mamba_gates.da_log", da_log, accum, Shape{heads}));
  return VisitKernel(ctx, gates.raw.dtype, [&]<class T>(auto device) {
    return kernels::MambaGatesBackward<T>(
        device, ctx, gates, {.ddt = ddt, .da = da, .draw = draw, .dbias = dbias, .da_log = da_log});
  });
}

}  // namespace annulus
