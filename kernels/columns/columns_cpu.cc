#include "kernels/columns/columns_kernels.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kElementsBetweenPolls = int64_t{1} << 16;  // tens of microseconds

}  // namespace

template <typename From, typename To>
absl::Status MoveColumns(CpuTag, Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs,
                         Write write, TensorRef y) {
  const int64_t rows = x.dim(0) * x.dim(1);
  int64_t moved = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (const ColumnRun& run : runs) {
      const From* from = x.data<From>() + row * x.dim(2) + run.from;
      To* to = y.data<To>() + row * y.dim(2) + run.to;
      if (write == Write::kOverwrite) {
        for (int64_t i = 0; i < run.columns; ++i) to[i] = static_cast<To>(from[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < run.columns; ++i) to[i] = static_cast<To>(to[i] + from[i]);
      }
      moved += run.columns;
    }
    if (moved < kElementsBetweenPolls) continue;
    ctx.Poll();
    moved = 0;
  }
  return absl::OkStatus();
}

#define ANNULUS_INSTANTIATE(From, To)                                                                        \
  template absl::Status MoveColumns<From, To>(CpuTag, Context&, ConstTensorRef, absl::Span<const ColumnRun>, \
                                              Write, TensorRef)
ANNULUS_INSTANTIATE(float, float);
ANNULUS_INSTANTIATE(float, double);
ANNULUS_INSTANTIATE(double, float);
ANNULUS_INSTANTIATE(double, double);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
