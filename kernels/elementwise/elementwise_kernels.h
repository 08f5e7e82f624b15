#pragma once

// Typed kernels of annulus/ops/elementwise.h, one overload per device. Arguments are checked.

#include "annulus/ops/elementwise.h"

namespace annulus::kernels {

absl::Status ZeroBytes(CpuTag, Context& ctx, TensorRef x);
absl::Status ZeroBytes(CudaTag, Context& ctx, TensorRef x);

absl::Status CopyBytes(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y);
absl::Status CopyBytes(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y);

absl::Status Cast(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y);   // f32, f64, bf16
absl::Status Cast(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y);  // f32, bf16

template <typename T>
absl::Status AddInPlace(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y);
template <typename T>
absl::Status AddInPlace(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y);

template <typename T>
absl::Status Scale(CpuTag, Context& ctx, double factor, TensorRef x);
template <typename T>
absl::Status Scale(CudaTag, Context& ctx, double factor, TensorRef x);

template <typename T>
absl::Status RepeatRow(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y);
template <typename T>
absl::Status RepeatRow(CudaTag, Context& ctx, ConstTensorRef x, TensorRef y);

template <typename T>
absl::Status AddSumOfSquares(CpuTag, Context& ctx, ConstTensorRef x, TensorRef sum);
template <typename T>
absl::Status AddSumOfSquares(CudaTag, Context& ctx, ConstTensorRef x, TensorRef sum);

absl::Status ClipFactor(CpuTag, Context& ctx, ConstTensorRef stats, double max_norm, TensorRef factor);
absl::Status ClipFactor(CudaTag, Context& ctx, ConstTensorRef stats, double max_norm, TensorRef factor);

}  // namespace annulus::kernels
