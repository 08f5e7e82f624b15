#include <algorithm>

#include "kernels/embedding/embedding_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status EmbeddingForward(CpuTag, absl::Span<const int32_t> tokens, ConstTensorRef table, TensorRef y) {
  const int64_t d = table.dim(1);
  T* out = y.data<T>();
  for (const int32_t token : tokens) out = std::copy_n(table.data<T>() + token * d, d, out);
  return absl::OkStatus();
}

template <typename T>
absl::Status EmbeddingBackward(CpuTag, absl::Span<const int32_t> tokens, ConstTensorRef dy,
                               TensorRef dtable) {
  const int64_t d = dtable.dim(1);
  const T* from = dy.data<T>();
  for (const int32_t token : tokens) {
    T* to = dtable.data<T>() + token * d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) to[i] += from[i];
    from += d;
  }
  return absl::OkStatus();
}

template absl::Status EmbeddingForward<float>(CpuTag, absl::Span<const int32_t>, ConstTensorRef, TensorRef);
template absl::Status EmbeddingForward<double>(CpuTag, absl::Span<const int32_t>, ConstTensorRef, TensorRef);
template absl::Status EmbeddingBackward<float>(CpuTag, absl::Span<const int32_t>, ConstTensorRef, TensorRef);
template absl::Status EmbeddingBackward<double>(CpuTag, absl::Span<const int32_t>, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
