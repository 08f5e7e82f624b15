#include "annulus/ops/columns.h"

#include <algorithm>
#include <vector>

#include "kernels/columns/columns_kernels.h"
#include "kernels/common/arguments.h"

namespace annulus {
namespace {

absl::Status CheckRuns(const ConstTensorRef& x, absl::Span<const ColumnRun> runs, const TensorRef& y) {
  if (x.rank() != 3 || y.rank() != 3 || x.dim(0) != y.dim(0) || x.dim(1) != y.dim(1)) {
    return Invalid("move_columns: x=", ToString(x.shape()), ", y=", ToString(y.shape()),
                   ": expected [rows, batch, columns] with as many rows and batch items");
  }
  for (const ColumnRun& run : runs) {
    if (run.columns < 0 || run.from < 0 || run.from + run.columns > x.dim(2) || run.to < 0 ||
        run.to + run.columns > y.dim(2)) {
      return Invalid("move_columns.runs: ", run.columns, " columns from ", run.from, " to ", run.to,
                     ": expected inside of the ", x.dim(2), " of x and the ", y.dim(2), " of y");
    }
  }
  return absl::OkStatus();
}

// fn.template operator()<T>() for the C++ type of a compute dtype of the device.
template <typename Fn>
absl::Status VisitCompute(CpuTag, DType dtype, Fn&& fn) {
  return dtype == DType::kF64 ? fn.template operator()<double>() : fn.template operator()<float>();
}
#if ANNULUS_HAS_CUDA
template <typename Fn>
absl::Status VisitCompute(CudaTag, DType dtype, Fn&& fn) {
  return dtype == DType::kBF16 ? fn.template operator()<BFloat16>() : fn.template operator()<float>();
}
#endif

bool Overlap(const ColumnRun& a, const ColumnRun& b) {
  return a.to < b.to + b.columns && b.to < a.to + a.columns;
}

// The same, cut so that two of them name the same columns of y or none that both do.
std::vector<ColumnRun> CutWhereTheyMeet(absl::Span<const ColumnRun> runs) {
  std::vector<ColumnRun> cut;
  for (const ColumnRun& run : runs) {
    std::vector<int64_t> ends = {run.to + run.columns};
    for (const ColumnRun& other : runs) {
      if (!Overlap(run, other)) continue;
      for (const int64_t end : {other.to, other.to + other.columns}) {
        if (run.to < end && end < run.to + run.columns) ends.push_back(end);
      }
    }
    std::sort(ends.begin(), ends.end());
    int64_t begin = run.to;
    for (const int64_t end : ends) {
      if (end > begin) cut.push_back({run.from + begin - run.to, begin, end - begin});
      begin = std::max(begin, end);
    }
  }
  return cut;
}

// The first run for each of the columns of y; the others stay in `runs`.
std::vector<ColumnRun> TakeApart(std::vector<ColumnRun>* runs) {
  std::vector<ColumnRun> apart, others;
  for (const ColumnRun& run : *runs) {
    const bool shares =
        std::any_of(apart.begin(), apart.end(), [&](const ColumnRun& taken) { return Overlap(taken, run); });
    (shares ? others : apart).push_back(run);
  }
  *runs = std::move(others);
  return apart;
}

}  // namespace

absl::Status MoveColumns(Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs, Write write,
                         TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "move_columns.x", x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "move_columns.y", y));
  ANNULUS_RETURN_IF_ERROR(CheckRuns(x, runs, y));
  std::vector<ColumnRun> left = CutWhereTheyMeet(runs);
  while (!left.empty()) {
    const std::vector<ColumnRun> now = TakeApart(&left);
    ANNULUS_RETURN_IF_ERROR(VisitKernel(ctx, x.dtype(), [&]<class From>(auto device) {
      return VisitCompute(device, y.dtype(), [&]<class To>() {
        return kernels::MoveColumns<From, To>(device, ctx, x, now, write, y);
      });
    }));
    write = Write::kAccumulate;
  }
  return absl::OkStatus();
}

}  // namespace annulus
