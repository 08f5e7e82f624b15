#include <algorithm>

#include "kernels/common/recurrent_cuda.h"
#include "kernels/conv1d/conv1d_cuda.h"
#include "kernels/conv1d/conv1d_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
absl::StatusOr<CudaConv1dArgs<CudaType<T>>> ArgsOf(const Conv1d& conv, const ConstHeadsRef& x,
                                                   int64_t tile_rows) {
  ANNULUS_ASSIGN_OR_RETURN(const SegmentTable tiles,
                           MakeSegmentTable("conv1d.segments", conv.segments, tile_rows));
  return CudaConv1dArgs<CudaType<T>>{.rows = x.rows,
                                     .batch = x.batch,
                                     .channels = x.dim,
                                     .k = static_cast<int>(conv.w.dim(1)),
                                     .tiles = tiles,
                                     .w = CudaData<T>(conv.w),
                                     .bias = CudaDataOrNull<T>(conv.bias),
                                     .ages = CudaData<int32_t>(conv.ages),
                                     .halo = CudaDataOrNull<T>(conv.halo),
                                     .x = HeadRows<T>(x)};
}

}  // namespace

template <typename T>
absl::Status Conv1dForward(CudaTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y) {
  const int64_t tile = CudaConv1dTileRows(x.rows, x.batch, x.dim).forward;
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(conv, x, tile));
  return CudaStatus("conv1d forward", CudaConv1dForward(args, HeadRows<T>(y), ctx.stream()));
}

template <typename T>
absl::Status Conv1dBackward(CudaTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients) {
  const int64_t tile = CudaConv1dTileRows(x.rows, x.batch, x.dim).backward;
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(conv, x, tile));
  ArenaScope scope(ctx.scratch);
  const TensorRef scratch = ctx.scratch.Allocate(DType::kF32, {CudaConv1dScratch(args)});
  const bool some_empty = std::any_of(conv.segments.begin(), conv.segments.end(),
                                      [](const RowRange& segment) { return segment.empty(); });
  if (some_empty) {  // whose halo no kernel reaches
    ANNULUS_RETURN_IF_ERROR(CudaStatus(
        "conv1d backward", CudaZero(gradients.dhalo.raw(), gradients.dhalo.bytes(), ctx.stream())));
  }
  const CudaConv1dGradients<CudaType<T>> to{
      .dy = HeadRows<T>(dy),
      .dx = HeadRows<T>(gradients.dx),
      .dhalo = CudaDataOrNull<T>(gradients.dhalo),
      .dw = CudaData<float>(gradients.dw),
      .dbias = conv.bias.defined() ? CudaData<float>(gradients.dbias) : nullptr,
      .scratch = CudaData<float>(scratch)};
  return CudaStatus("conv1d backward", CudaConv1dBackward(args, to, ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                            \
  template absl::Status Conv1dForward<T>(CudaTag, Context&, const Conv1d&, ConstHeadsRef, HeadsRef);      \
  template absl::Status Conv1dBackward<T>(CudaTag, Context&, const Conv1d&, ConstHeadsRef, ConstHeadsRef, \
                                          const Conv1dGradients&)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
