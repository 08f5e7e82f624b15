#pragma once

// Kernels of annulus/ops/state.h, one overload per device. Arguments are checked; `in` may be undefined.

#include "annulus/ops/state.h"

namespace annulus::kernels {

absl::Status AdvanceState(CpuTag, Context& ctx, ConstTensorRef transition, Transpose transpose,
                          ConstTensorRef in, ConstTensorRef state, TensorRef out);
absl::Status AdvanceState(CudaTag, Context& ctx, ConstTensorRef transition, Transpose transpose,
                          ConstTensorRef in, ConstTensorRef state, TensorRef out);

absl::Status ComposeTransitions(CpuTag, Context& ctx, ConstTensorRef later, ConstTensorRef earlier,
                                TensorRef out);
absl::Status ComposeTransitions(CudaTag, Context& ctx, ConstTensorRef later, ConstTensorRef earlier,
                                TensorRef out);

}  // namespace annulus::kernels
