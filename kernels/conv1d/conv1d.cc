#include "annulus/ops/conv1d.h"

#include "kernels/common/arguments.h"
#include "kernels/common/segments.h"
#include "kernels/conv1d/conv1d_kernels.h"

namespace annulus {
namespace {

constexpr int64_t kMaxTaps = 8;

absl::Status CheckConv(const Context& ctx, const Conv1d& conv, const ConstHeadsRef& x) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "conv1d.x", x));
  if (x.heads != 1) return Invalid("conv1d.x.heads=", x.heads, ": expected 1 of all channels");
  if (conv.w.rank() != 2 || conv.w.dim(1) < 1 || conv.w.dim(1) > kMaxTaps) {
    return Invalid("conv1d.w=", ToString(conv.w.shape()), ": expected [channels, k], k in [1, ", kMaxTaps,
                   "]");
  }
  const int64_t k = conv.w.dim(1), segments = static_cast<int64_t>(conv.segments.size());
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "conv1d.w", conv.w, x.dtype, Shape{x.dim, k}));
  if (conv.bias.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "conv1d.bias", conv.bias, x.dtype, Shape{x.dim}));
  }
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "conv1d.ages", conv.ages, DType::kI32, Shape{x.rows, x.batch}));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckSegments("conv1d.segments", conv.segments, x.rows));
  return kernels::CheckTensor(ctx, "conv1d.halo", conv.halo, x.dtype, Shape{segments, k - 1, x.batch, x.dim});
}

}  // namespace

absl::Status Conv1dForward(Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckConv(ctx, conv, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("conv1d.y", y, x));
  return VisitKernel(
      ctx, x.dtype, [&]<class T>(auto device) { return kernels::Conv1dForward<T>(device, ctx, conv, x, y); });
}

absl::Status Conv1dBackward(Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckConv(ctx, conv, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("conv1d.dy", dy, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("conv1d.dx", gradients.dx, x));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "conv1d.dhalo", gradients.dhalo, x.dtype, conv.halo.shape()));
  const DType accum = AccumOf(x.dtype);
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "conv1d.dw", gradients.dw, accum, conv.w.shape()));
  if (conv.bias.defined()) {
    ANNULUS_RETURN_IF_ERROR(
        kernels::CheckTensor(ctx, "conv1d.dbias", gradients.dbias, accum, conv.bias.shape()));
  }
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::Conv1dBackward<T>(device, ctx, conv, x, dy, gradients);
  });
}

}  // namespace annulus
