#pragma once

// Typed kernels of annulus/ops/embedding.h, one overload per device. Arguments are checked.

#include "annulus/ops/embedding.h"

namespace annulus::kernels {

template <typename T>
absl::Status EmbeddingForward(CpuTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef table, TensorRef y);
template <typename T>
absl::Status EmbeddingForward(CudaTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef table,
                              TensorRef y);

template <typename T>
absl::Status EmbeddingBackward(CpuTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef dy,
                               TensorRef dtable);
template <typename T>
absl::Status EmbeddingBackward(CudaTag, Context& ctx, ConstTensorRef tokens, ConstTensorRef dy,
                               TensorRef dtable);

}  // namespace annulus::kernels
