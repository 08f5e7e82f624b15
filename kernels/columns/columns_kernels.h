#pragma once

// Typed kernels of annulus/ops/columns.h, one overload per device. Arguments are checked, and no two runs of
// a call name the same columns of y.

#include "annulus/ops/columns.h"

namespace annulus::kernels {

template <typename From, typename To>
absl::Status MoveColumns(CpuTag, Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs,
                         Write write, TensorRef y);
template <typename From, typename To>
absl::Status MoveColumns(CudaTag, Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs,
                         Write write, TensorRef y);

}  // namespace annulus::kernels
