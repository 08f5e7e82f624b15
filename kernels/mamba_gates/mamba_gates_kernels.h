#pragma once

// Typed kernels of annulus/ops/mamba_gates.h, one overload per device. Arguments are checked; T is that of
// gates.raw.

#include "annulus/ops/mamba_gates.h"

namespace annulus::kernels {

template <typename T>
absl::Status MambaGatesForward(CpuTag, Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a);
template <typename T>
absl::Status MambaGatesForward(CudaTag, Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a);

struct MambaGatesGradients {
  ConstTensorRef ddt, da;  // ddt may be undefined
  MatrixRef draw;
  TensorRef dbias, da_log;
};

template <typename T>
absl::Status MambaGatesBackward(CpuTag, Context& ctx, const MambaGates& gates,
                                const MambaGatesGradients& gradients);
template <typename T>
absl::Status MambaGatesBackward(CudaTag, Context& ctx, const MambaGates& gates,
                                const MambaGatesGradients& gradients);

}  // namespace annulus::kernels
