#pragma once

// Typed kernels of annulus/ops/swiglu.h, one overload per device. Arguments are checked.

#include "annulus/ops/swiglu.h"

namespace annulus::kernels {

template <typename T>
absl::Status SwigluForward(CpuTag, Context& ctx, ConstTensorRef gate_up, TensorRef h);
template <typename T>
absl::Status SwigluForward(CudaTag, Context& ctx, ConstTensorRef gate_up, TensorRef h);

template <typename T>
absl::Status SwigluBackward(CpuTag, Context& ctx, ConstTensorRef gate_up, ConstTensorRef dh,
                            TensorRef dgate_up);
template <typename T>
absl::Status SwigluBackward(CudaTag, Context& ctx, ConstTensorRef gate_up, ConstTensorRef dh,
                            TensorRef dgate_up);

}  // namespace annulus::kernels
