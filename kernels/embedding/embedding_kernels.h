#pragma once

// Typed kernels of annulus/ops/embedding.h, one overload per device. Arguments are checked.

#include "annulus/ops/embedding.h"

namespace annulus::kernels {

template <typename T>
absl::Status EmbeddingForward(CpuTag, absl::Span<const int32_t> tokens, ConstTensorRef table, TensorRef y);
template <typename T>
absl::Status EmbeddingBackward(CpuTag, absl::Span<const int32_t> tokens, ConstTensorRef dy, TensorRef dtable);

}  // namespace annulus::kernels
