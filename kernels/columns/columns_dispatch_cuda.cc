#include <algorithm>

#include "kernels/columns/columns_cuda.h"
#include "kernels/columns/columns_kernels.h"
#include "kernels/common/cuda_call.h"

namespace annulus::kernels {

template <typename From, typename To>
absl::Status MoveColumns(CudaTag, Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs,
                         Write write, TensorRef y) {
  CudaMoveColumnsArgs<CudaType<From>, CudaType<To>> args{
      .rows = x.dim(0) * x.dim(1),
      .x = CudaData<From>(x),
      .y = CudaData<To>(y),
      .x_columns = x.dim(2),
      .y_columns = y.dim(2),
      .runs = {},
      .write = write == Write::kOverwrite ? ColumnWrite::kOverwrite : ColumnWrite::kAdd};
  for (size_t first = 0; first < runs.size(); first += kMaxColumnRuns) {
    args.runs = {};
    for (const ColumnRun& run : runs.subspan(first, std::min<size_t>(kMaxColumnRuns, runs.size() - first))) {
      const auto i = static_cast<size_t>(args.runs.count++);
      args.runs.begin[i] = args.runs.columns;
      args.runs.from[i] = run.from;
      args.runs.to[i] = run.to;
      args.runs.columns += run.columns;
    }
    ANNULUS_RETURN_IF_ERROR(CudaStatus("move columns", CudaMoveColumns(args, ctx.stream())));
  }
  return absl::OkStatus();
}

#define ANNULUS_INSTANTIATE(From, To)                                            \
  template absl::Status MoveColumns<From, To>(CudaTag, Context&, ConstTensorRef, \
                                              absl::Span<const ColumnRun>, Write, TensorRef)
ANNULUS_INSTANTIATE(float, float);
ANNULUS_INSTANTIATE(float, BFloat16);
ANNULUS_INSTANTIATE(BFloat16, float);
ANNULUS_INSTANTIATE(BFloat16, BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
