#include "annulus/ops/elementwise.h"

#include "kernels/common/arguments.h"
#include "kernels/elementwise/elementwise_kernels.h"

namespace annulus {

using kernels::CheckFloat;
using kernels::CheckTensor;

absl::Status Zero(Context& ctx, TensorRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "zero.x", x, x.dtype(), x.shape()));
  return VisitDevice(ctx, [&](auto device) { return kernels::ZeroBytes(device, x); });
}

absl::Status Copy(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "copy.x", x, x.dtype(), x.shape()));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "copy.y", y, x.dtype(), x.shape()));
  return VisitDevice(ctx, [&](auto device) { return kernels::CopyBytes(device, x, y); });
}

absl::Status AddInPlace(Context& ctx, ConstTensorRef x, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckFloat(ctx, "add.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "add.y", y, x.dtype(), x.shape()));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(x.dtype(), [&]<class T>() { return kernels::AddInPlace<T>(device, x, y); });
  });
}

absl::Status Scale(Context& ctx, double factor, TensorRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckFloat(ctx, "scale.x", x));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(x.dtype(), [&]<class T>() { return kernels::Scale<T>(device, factor, x); });
  });
}

absl::StatusOr<double> SumOfSquares(Context& ctx, ConstTensorRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckFloat(ctx, "sum_of_squares.x", x));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(x.dtype(), [&]<class T>() { return kernels::SumOfSquares<T>(device, x); });
  });
}

}  // namespace annulus
