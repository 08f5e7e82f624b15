#include <cstring>

#include "kernels/elementwise/elementwise_kernels.h"

namespace annulus::kernels {

absl::Status ZeroBytes(CpuTag, TensorRef x) {
  if (x.bytes() > 0) std::memset(x.raw(), 0, static_cast<size_t>(x.bytes()));
  return absl::OkStatus();
}

absl::Status CopyBytes(CpuTag, ConstTensorRef x, TensorRef y) {
  if (x.bytes() > 0 && x.raw() != y.raw()) std::memcpy(y.raw(), x.raw(), static_cast<size_t>(x.bytes()));
  return absl::OkStatus();
}

template <typename T>
absl::Status AddInPlace(CpuTag, ConstTensorRef x, TensorRef y) {
  const T* from = x.data<T>();
  T* to = y.data<T>();
  const int64_t n = x.elements();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  return absl::OkStatus();
}

template <typename T>
absl::Status Scale(CpuTag, double factor, TensorRef x) {
  const T by = static_cast<T>(factor);
  T* data = x.data<T>();
  const int64_t n = x.elements();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) data[i] *= by;
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<double> SumOfSquares(CpuTag, ConstTensorRef x) {
  const T* data = x.data<T>();
  const int64_t n = x.elements();
  double sum = 0;
  // The order of the lanes is fixed when this is compiled.
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(data[i]) * static_cast<double>(data[i]);
  return sum;
}

template absl::Status AddInPlace<float>(CpuTag, ConstTensorRef, TensorRef);
template absl::Status AddInPlace<double>(CpuTag, ConstTensorRef, TensorRef);
template absl::Status Scale<float>(CpuTag, double, TensorRef);
template absl::Status Scale<double>(CpuTag, double, TensorRef);
template absl::StatusOr<double> SumOfSquares<float>(CpuTag, ConstTensorRef);
template absl::StatusOr<double> SumOfSquares<double>(CpuTag, ConstTensorRef);

}  // namespace annulus::kernels
