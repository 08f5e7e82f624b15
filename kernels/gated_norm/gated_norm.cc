#include "annulus/ops/gated_norm.h"

#include "kernels/common/arguments.h"
#include "kernels/gated_norm/gated_norm_kernels.h"

namespace annulus {
namespace {

// The norm with its group_columns set.
absl::StatusOr<GatedNorm> Checked(const Context& ctx, GatedNorm norm) {
  const ConstMatrixRef& x = norm.x;
  if (!kernels::IsCompute(ctx, x.dtype)) {
    return Invalid("gated_norm.x.dtype=", Name(x.dtype), ": expected ", kernels::ComputeNames(ctx));
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.x", x, x.dtype, x.rows, x.cols));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.gate", norm.gate, x.dtype, x.rows, x.cols));
  if (norm.groups < 1 || x.cols % norm.groups != 0) {
    return Invalid("gated_norm.groups=", norm.groups, ": expected a divisor of ", x.cols, " columns");
  }
  if (!(norm.eps >= 0)) return Invalid("gated_norm.eps=", norm.eps, ": expected at least 0");
  const int64_t group = x.cols / norm.groups;
  const bool shared = norm.w.rank() == 1 && norm.w.dim(0) == group;
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "gated_norm.w", norm.w, x.dtype, Shape{shared ? group : x.cols}));
  if (norm.group_columns == 0) norm.group_columns = group;
  if (norm.group_columns < group || (norm.group_columns > group && !norm.sum_over_ranks)) {
    return Invalid("gated_norm.group_columns=", norm.group_columns, ": expected the ", group,
                   " columns of a group here, or more and a sum over ranks");
  }
  return norm;
}

}  // namespace

absl::Status GatedNormForward(Context& ctx, const GatedNorm& norm, MatrixRef y) {
  ANNULUS_ASSIGN_OR_RETURN(const GatedNorm checked, Checked(ctx, norm));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.y", y, norm.x.dtype, norm.x.rows, norm.x.cols));
  return VisitKernel(ctx, norm.x.dtype, [&]<class T>(auto device) {
    return kernels::GatedNormForward<T>(device, ctx, checked, y);
  });
}

absl::Status GatedNormBackward(Context& ctx, const GatedNorm& norm, ConstMatrixRef dy, MatrixRef dx,
                               MatrixRef dgate, TensorRef dw) {
  ANNULUS_ASSIGN_OR_RETURN(const GatedNorm checked, Checked(ctx, norm));
  const DType dtype = norm.x.dtype;
  const int64_t tokens = norm.x.rows, columns = norm.x.cols;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.dy", dy, dtype, tokens, columns));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.dx", dx, dtype, tokens, columns));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckMatrix("gated_norm.dgate", dgate, dtype, tokens, columns));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "gated_norm.dw", dw, AccumOf(dtype), norm.w.shape()));
  return VisitKernel(ctx, dtype, [&]<class T>(auto device) {
    return kernels::GatedNormBackward<T>(device, ctx, checked,
                                         {.dy = dy, .dx = dx, .dgate = dgate, .dw = dw});
  });
}

}  // namespace annulus
