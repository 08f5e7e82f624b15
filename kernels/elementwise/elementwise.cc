#include "annulus/ops/elementwise.h"

#include "kernels/common/arguments.h"
#include "kernels/elementwise/elementwise_kernels.h"

namespace annulus {
namespace {

using kernels::CheckCompute;
using kernels::CheckTensor;

// Any dtype, on the context's device.
absl::Status CheckPlace(const Context& ctx, absl::string_view name, const ConstTensorRef& x) {
  return CheckTensor(ctx, name, x, x.dtype(), x.shape());
}

// Hosts also store bf16, though they compute nothing in it.
absl::Status CheckStored(const Context& ctx, absl::string_view name, const ConstTensorRef& x) {
  if (x.dtype() == DType::kBF16) return CheckPlace(ctx, name, x);
  return CheckCompute(ctx, name, x);
}

}  // namespace

absl::Status Zero(Context& ctx, TensorRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckPlace(ctx, "zero.x", x));
  return VisitDevice(ctx, [&](auto device) { return kernels::ZeroBytes(device, ctx, x); });
}

absl::Status Copy(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckPlace(ctx, "copy.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "copy.y", y, x.dtype(), x.shape()));
  return VisitDevice(ctx, [&](auto device) { return kernels::CopyBytes(device, ctx, x, y); });
}

absl::Status Cast(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckStored(ctx, "cast.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckStored(ctx, "cast.y", y));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "cast.y", y, y.dtype(), x.shape()));
  return VisitDevice(ctx, [&](auto device) { return kernels::Cast(device, ctx, x, y); });
}

absl::Status AddInPlace(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckCompute(ctx, "add.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "add.y", y, x.dtype(), x.shape()));
  return VisitKernel(ctx, x.dtype(),
                     [&]<class T>(auto device) { return kernels::AddInPlace<T>(device, ctx, x, y); });
}

absl::Status Scale(Context& ctx, double factor, TensorRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckCompute(ctx, "scale.x", x));
  return VisitKernel(ctx, x.dtype(),
                     [&]<class T>(auto device) { return kernels::Scale<T>(device, ctx, factor, x); });
}

absl::Status RepeatRow(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckCompute(ctx, "repeat_row.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "repeat_row.y", y, x.dtype(), y.shape()));
  if (x.rank() != 1 || y.rank() < 1 || y.dim(y.rank() - 1) != x.dim(0)) {
    return Invalid("repeat_row.y=", ToString(y.shape()), ": expected rows of x=", ToString(x.shape()));
  }
  return VisitKernel(ctx, x.dtype(),
                     [&]<class T>(auto device) { return kernels::RepeatRow<T>(device, ctx, x, y); });
}

absl::Status AddSumOfSquares(Context& ctx, ConstTensorRef x, TensorRef sum) {
  ANNULUS_RETURN_IF_ERROR(CheckCompute(ctx, "sum_of_squares.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "sum_of_squares.sum", sum, DType::kF64, {1}));
  return VisitKernel(ctx, x.dtype(),
                     [&]<class T>(auto device) { return kernels::AddSumOfSquares<T>(device, ctx, x, sum); });
}

absl::Status ClipFactor(Context& ctx, ConstTensorRef stats, double max_norm, TensorRef factor) {
  if (stats.rank() != 1 || stats.dim(0) < 1) {
    return Invalid("clip.stats=", ToString(stats.shape()), ": expected [n] from n = 1");
  }
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "clip.stats", stats, DType::kF64, stats.shape()));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "clip.factor", factor, DType::kF64, {1}));
  if (!(max_norm >= 0)) return Invalid("clip.max_norm=", max_norm, ": expected at least 0");
  return VisitDevice(ctx,
                     [&](auto device) { return kernels::ClipFactor(device, ctx, stats, max_norm, factor); });
}

}  // namespace annulus
