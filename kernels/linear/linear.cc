#include "annulus/ops/linear.h"

#include <limits>

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
  absl::string_view y_name;
  ConstMatrixRef y;
};

absl::Status CheckLinear(const Operands& m) {
  if (m.x.dtype != DType::kF32 && m.x.dtype != DType::kF64) {
    return Invalid(m.x_name, ".dtype=", Name(m.x.dtype), ": expected f32 or f64");
  }
  ANNULUS_RETURN_IF_ERROR(CheckMatrix(m.x_name, m.x, m.x.dtype, m.x.rows, m.x.cols));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix(m.w_name, m.w, m.x.dtype, m.w.rows, m.x.cols));
  return CheckMatrix(m.y_name, m.y, m.x.dtype, m.x.rows, m.w.rows);
}

}  // namespace

absl::Status LinearForward(Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckLinear({"linear.x", x, "linear.w", w, "linear.y", y}));
  absl::Status status = VisitDevice(ctx, [&](auto device) {
    return VisitFloat(x.dtype, [&]<class T>() { return kernels::LinearForward<T>(device, x, w, write, y); });
  });
  ctx.Poll();
  return status;
}

absl::Status LinearBackwardInput(Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx) {
  ANNULUS_RETURN_IF_ERROR(CheckLinear({"linear.dx", dx, "linear.w", w, "linear.dy", dy}));
  absl::Status status = VisitDevice(ctx, [&](auto device) {
    return VisitFloat(dy.dtype,
                      [&]<class T>() { return kernels::LinearBackwardInput<T>(device, dy, w, write, dx); });
  });
  ctx.Poll();
  return status;
}

absl::Status LinearBackwardWeight(Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw) {
  ANNULUS_RETURN_IF_ERROR(CheckLinear({"linear.x", x, "linear.dw", dw, "linear.dy", dy}));
  absl::Status status = VisitDevice(ctx, [&](auto device) {
    return VisitFloat(dy.dtype,
                      [&]<class T>() { return kernels::LinearBackwardWeight<T>(device, dy, x, dw); });
  });
  ctx.Poll();
  return status;
}

}  // namespace annulus
