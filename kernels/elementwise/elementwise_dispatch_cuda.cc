#include "annulus/device/transfer.h"
#include "kernels/common/cuda_call.h"
#include "kernels/elementwise/elementwise_cuda.h"
#include "kernels/elementwise/elementwise_kernels.h"

namespace annulus::kernels {
namespace {

template <typename From, typename To>
absl::Status CastTo(Context& ctx, const ConstTensorRef& x, const TensorRef& y) {
  return CudaStatus("cast", CudaCast(CudaData<From>(x), x.elements(), CudaData<To>(y), ctx.stream()));
}

}  // namespace

absl::Status ZeroBytes(CudaTag, Context& ctx, TensorRef x) {
  annulus::ZeroBytes(x, ctx.stream());
  return absl::OkStatus();
}

absl::Status CopyBytes(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  if (x.raw() != y.raw()) annulus::CopyBytes(x, y, ctx.stream());
  return absl::OkStatus();
}

absl::Status Cast(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  if (x.dtype() == y.dtype()) return CopyBytes(CudaTag{}, ctx, x, y);
  if (y.dtype() == DType::kBF16) return CastTo<float, BFloat16>(ctx, x, y);
  return CastTo<BFloat16, float>(ctx, x, y);
}

template <typename T>
absl::Status AddInPlace(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  return CudaStatus("add", CudaAdd(CudaData<T>(x), x.elements(), CudaData<T>(y), ctx.stream()));
}

template <typename T>
absl::Status Scale(CudaTag, Context& ctx, double factor, TensorRef x) {
  return CudaStatus("scale", CudaScale(factor, x.elements(), CudaData<T>(x), ctx.stream()));
}

template <typename T>
absl::Status RepeatRow(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  const int64_t columns = x.dim(0), rows = columns == 0 ? 0 : y.elements() / columns;
  return CudaStatus("repeat row", CudaRepeatRow(CudaData<T>(x), rows, columns, CudaData<T>(y), ctx.stream()));
}

template <typename T>
absl::Status AddSumOfSquares(CudaTag, Context& ctx, ConstTensorRef x, TensorRef sum) {
  ArenaScope scope(ctx.scratch);
  const TensorRef partial = ctx.scratch.Allocate(DType::kF64, {kSumOfSquaresScratch});
  return CudaStatus("sum of squares",
                    CudaSumOfSquares(CudaData<T>(x), x.elements(), CudaData<double>(partial),
                                     CudaData<double>(sum), ctx.stream()));
}

absl::Status ClipFactor(CudaTag, Context& ctx, ConstTensorRef stats, double max_norm, TensorRef factor) {
  return CudaStatus("clip factor", CudaClipFactor(CudaData<double>(stats), stats.elements(), max_norm,
                                                  CudaData<double>(factor), ctx.stream()));
}

template absl::Status AddInPlace<float>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddInPlace<BFloat16>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status Scale<float>(CudaTag, Context&, double, TensorRef);
template absl::Status Scale<BFloat16>(CudaTag, Context&, double, TensorRef);
template absl::Status RepeatRow<float>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status RepeatRow<BFloat16>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddSumOfSquares<float>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddSumOfSquares<BFloat16>(CudaTag, Context&, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
