#include <algorithm>

#include "kernels/embedding/embedding_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status EmbeddingForward(CpuTag, Context&, ConstTensorRef tokens, ConstTensorRef table, TensorRef y) {
  const int64_t count = tokens.dim(0), d = table.dim(1);
  const auto* token = tokens.data<int32_t>();
  T* out = y.data<T>();
  for (int64_t t = 0; t < count; ++t, out += d) {
    if (token[t] < 0) {
      std::fill_n(out, d, T{0});
    } else {
      std::copy_n(table.data<T>() + token[t] * d, d, out);
    }
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status EmbeddingBackward(CpuTag, Context&, ConstTensorRef tokens, ConstTensorRef dy, TensorRef dtable) {
  const int64_t count = tokens.dim(0), d = dtable.dim(1);
  const auto* token = tokens.data<int32_t>();
  const T* from = dy.data<T>();
  for (int64_t t = 0; t < count; ++t, from += d) {
    if (token[t] < 0) continue;
    T* to = dtable.data<T>() + token[t] * d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) to[i] += from[i];
  }
  return absl::OkStatus();
}

template absl::Status EmbeddingForward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status EmbeddingForward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status EmbeddingBackward<float>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status EmbeddingBackward<double>(CpuTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
