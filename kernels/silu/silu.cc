#include "annulus/ops/silu.h"

#include "kernels/common/arguments.h"
#include "kernels/silu/silu_kernels.h"

namespace annulus {
namespace {

absl::Status CheckLike(absl::string_view name, const ConstMatrixRef& got, const ConstMatrixRef& x) {
  if (got.rows == x.rows && got.cols == x.cols && got.dtype == x.dtype) return absl::OkStatus();
  return Invalid(name, "=", Name(got.dtype), " [", got.rows, ", ", got.cols, "]: expected ", Name(x.dtype),
                 " [", x.rows, ", ", x.cols, "]");
}

}  // namespace

absl::Status SiluForward(Context& ctx, ConstMatrixRef x, MatrixRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckLike("silu.y", y, x));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::SiluForward<T>(device, ctx, x, y); });
}

absl::Status SiluBackward(Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx) {
  ANNULUS_RETURN_IF_ERROR(CheckLike("silu.dy", dy, x));
  ANNULUS_RETURN_IF_ERROR(CheckLike("silu.dx", dx, x));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::SiluBackward<T>(device, ctx, x, dy, dx); });
}

absl::Status SigmoidForward(Context& ctx, ConstMatrixRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "sigmoid.y", y, AccumOf(x.dtype), {x.rows, x.cols}));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::SigmoidForward<T>(device, ctx, x, y); });
}

absl::Status SigmoidBackward(Context& ctx, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx) {
  const Shape shape{dx.rows, dx.cols};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "sigmoid.y", y, AccumOf(dx.dtype), shape));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "sigmoid.dy", dy, AccumOf(dx.dtype), shape));
  return VisitKernel(ctx, dx.dtype, [&]<class T>(auto device) {
    return kernels::SigmoidBackward<T>(device, ctx, y, dy, dx);
  });
}

}  // namespace annulus
