#include "annulus/ops/linear.h"

#include <limits>

#include "kernels/common/arguments.h"
#include "kernels/linear/linear_kernels.h"

namespace annulus {
namespace {

// BLAS libraries count rows, columns and strides in 32 bits.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

absl::Status CheckMatrix(absl::string_view name, const ConstMatrixRef& m, DType dtype, int64_t rows,
                         int64_t cols) {
  if (m.dtype != dtype || m.rows != rows || m.cols != cols) {
    return Invalid(name, "=", Name(m.dtype), "[", m.rows, ", ", m.cols, "]: expected ", Name(dtype), "[",
                   rows, ", ", cols, "]");
  }
  if (rows < 0 || cols < 0 || rows > kMaxCount || cols > kMaxCount) {
    return Invalid(name, " of shape [", rows, ", ", cols, "]: expected counts in [0, ", kMaxCount, "]");
  }
  if (m.stride < cols || m.stride > kMaxCount) {
    return Invalid(name, ".stride=", m.stride, ": expected at least its ", cols, " columns and at most ",
                   kMaxCount);
  }
  return absl::OkStatus();
}

// x: [tokens, in]   w: [out, in]   y: [tokens, out]
struct Operands {
  absl::string_view x_name;
  ConstMatrixRef x;
  absl::string_view w_name;
  ConstMatrixRef w;
  DType w_dtype;  // expected; x and y are of one dtype
  absl::string_view y_name;
  ConstMatrixRef y;
};

absl::Status CheckLinear(const Context& ctx, const Operands& m) {
  if (!kernels::IsCompute(ctx, m.x.dtype)) {
    return Invalid(m.x_name, ".dtype=", Name(m.x.dtype), ": expected ", kernels::ComputeNames(ctx));
  }
  ANNULUS_RETURN_IF_ERROR(CheckMatrix(m.x_name, m.x, m.x.dtype, m.x.rows, m.x.cols));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix(m.w_name, m.w, m.w_dtype, m.w.rows, m.x.cols));
  return CheckMatrix(m.y_name, m.y, m.x.dtype, m.x.rows, m.w.rows);
}

}  // namespace

absl::Status LinearForward(Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckLinear(ctx, {"linear.x", x, "linear.w", w, x.dtype, "linear.y", y}));
  absl::Status status = VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::LinearForward<T>(device, ctx, x, w, write, y);
  });
  ctx.Poll();
  return status;
}

absl::Status LinearBackwardInput(Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx) {
  ConstMatrixRef result = dx;
  if (dx.dtype == AccumOf(dy.dtype)) result.dtype = dy.dtype;
  ANNULUS_RETURN_IF_ERROR(
      CheckLinear(ctx, {"linear.dx", result, "linear.w", w, result.dtype, "linear.dy", dy}));
  absl::Status status = VisitKernel(ctx, dy.dtype, [&]<class T>(auto device) {
    return kernels::LinearBackwardInput<T>(device, ctx, dy, w, write, dx);
  });
  ctx.Poll();
  return status;
}

absl::Status LinearBackwardWeight(Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw) {
  ANNULUS_RETURN_IF_ERROR(
      CheckLinear(ctx, {"linear.x", x, "linear.dw", dw, AccumOf(x.dtype), "linear.dy", dy}));
  absl::Status status = VisitKernel(ctx, dy.dtype, [&]<class T>(auto device) {
    return kernels::LinearBackwardWeight<T>(device, ctx, dy, x, dw);
  });
  ctx.Poll();
  return status;
}

}  // namespace annulus
