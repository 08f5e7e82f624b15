#pragma once

// Typed kernels of annulus/ops/gated_norm.h, one overload per device. Arguments are checked, group_columns is
// set. A kernel calls norm.sum_over_ranks, where there is one, once for its tokens: [tokens, groups] forward,
// [tokens, 2 groups] backward.

#include "annulus/ops/gated_norm.h"

namespace annulus::kernels {

template <typename T>
absl::Status GatedNormForward(CpuTag, Context& ctx, const GatedNorm& norm, MatrixRef y);
template <typename T>
absl::Status GatedNormForward(CudaTag, Context& ctx, const GatedNorm& norm, MatrixRef y);

struct GatedNormGradients {
  ConstMatrixRef dy;
  MatrixRef dx, dgate;
  TensorRef dw;
};

template <typename T>
absl::Status GatedNormBackward(CpuTag, Context& ctx, const GatedNorm& norm,
                               const GatedNormGradients& gradients);
template <typename T>
absl::Status GatedNormBackward(CudaTag, Context& ctx, const GatedNorm& norm,
                               const GatedNormGradients& gradients);

}  // namespace annulus::kernels
