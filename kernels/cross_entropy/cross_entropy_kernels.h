#pragma once

// Typed kernels of annulus/ops/cross_entropy.h, one overload per device. Arguments are checked.

#include "annulus/ops/cross_entropy.h"

namespace annulus::kernels {

// loss += the sum over counted tokens; computes the loss alone where `gradients` is null.
template <typename T>
absl::Status LinearCrossEntropy(CpuTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                const LinearCrossEntropyGradients* gradients, TensorRef loss);
template <typename T>
absl::Status LinearCrossEntropy(CudaTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                const LinearCrossEntropyGradients* gradients, TensorRef loss);

// Stats are f32 or f64 on CPUs and f32 on GPUs.
absl::Status MergeVocabularyStats(CpuTag, Context& ctx, ConstTensorRef parts, TensorRef stats);
absl::Status MergeVocabularyStats(CudaTag, Context& ctx, ConstTensorRef parts, TensorRef stats);

}  // namespace annulus::kernels
