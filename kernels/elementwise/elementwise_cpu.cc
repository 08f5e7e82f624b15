#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/elementwise/elementwise_kernels.h"

namespace annulus::kernels {
namespace {

// Rounded once: through f32 to nearest, a double would round twice. So the way to f32 rounds to odd (Boldo
// and Melquiond, 2008), which keeps on which side of a tie the value lies.
BFloat16 RoundToBFloat16(double x) {
  float near = static_cast<float>(x);
  if (static_cast<double>(near) == x || std::isnan(x)) return ToBFloat16(near);
  auto bits = std::bit_cast<uint32_t>(near);
  if (std::abs(static_cast<double>(near)) > std::abs(x)) --bits;  // towards zero
  return ToBFloat16(std::bit_cast<float>(bits | 1));
}

template <typename To, typename From>
To Convert(From x) {
  if constexpr (std::is_same_v<From, To>)
    return x;
  else if constexpr (std::is_same_v<From, BFloat16>)
    return static_cast<To>(ToFloat(x));
  else if constexpr (!std::is_same_v<To, BFloat16>)
    return static_cast<To>(x);
  else if constexpr (std::is_same_v<From, double>)
    return RoundToBFloat16(x);
  else
    return ToBFloat16(x);
}

// Calls fn(begin, count) for pieces of a long array that take tens of microseconds, and polls between them.
template <typename Fn>
void ForPieces(Context& ctx, int64_t count, const Fn& fn) {
  constexpr int64_t kPiece = int64_t{1} << 18;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    if (begin > 0) ctx.Poll();
    fn(begin, std::min(kPiece, count - begin));
  }
}

// Of every floating dtype that a host stores.
template <typename Fn>
void VisitStored(DType dtype, Fn&& fn) {
  if (dtype == DType::kBF16) return fn.template operator()<BFloat16>();
  VisitFloat(dtype, fn);
}

}  // namespace

absl::Status ZeroBytes(CpuTag, Context& ctx, TensorRef x) {
  ForPieces(ctx, x.bytes(), [&](int64_t begin, int64_t bytes) {
    std::memset(static_cast<char*>(x.raw()) + begin, 0, static_cast<size_t>(bytes));
  });
  return absl::OkStatus();
}

absl::Status CopyBytes(CpuTag, Context&, ConstTensorRef x, TensorRef y) {
  if (x.bytes() > 0 && x.raw() != y.raw()) std::memcpy(y.raw(), x.raw(), static_cast<size_t>(x.bytes()));
  return absl::OkStatus();
}

absl::Status Cast(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  VisitStored(x.dtype(), [&]<class From>() {
    VisitStored(y.dtype(), [&]<class To>() {
      ForPieces(ctx, x.elements(), [&](int64_t begin, int64_t count) {
        const From* from = x.data<From>() + begin;
        std::transform(from, from + count, y.data<To>() + begin, Convert<To, From>);
      });
    });
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status AddInPlace(CpuTag, Context&, ConstTensorRef x, TensorRef y) {
  const T* from = x.data<T>();
  T* to = y.data<T>();
  const int64_t n = x.elements();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  return absl::OkStatus();
}

template <typename T>
absl::Status Scale(CpuTag, Context&, double factor, TensorRef x) {
  const T by = static_cast<T>(factor);
  T* data = x.data<T>();
  const int64_t n = x.elements();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) data[i] *= by;
  return absl::OkStatus();
}

template <typename T>
absl::Status RepeatRow(CpuTag, Context& ctx, ConstTensorRef x, TensorRef y) {
  const int64_t columns = x.dim(0), rows = columns == 0 ? 0 : y.elements() / columns;
  for (int64_t row = 0; row < rows; ++row) {
    if (row % 4096 == 4095) ctx.Poll();
    std::copy_n(x.data<T>(), columns, y.data<T>() + row * columns);
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status AddSumOfSquares(CpuTag, Context&, ConstTensorRef x, TensorRef sum) {
  const T* data = x.data<T>();
  const int64_t n = x.elements();
  double squares = 0;
  // The order of the lanes is fixed when this is compiled.
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(data[i]) * static_cast<double>(data[i]);
  *sum.data<double>() += squares;
  return absl::OkStatus();
}

absl::Status ClipFactor(CpuTag, Context&, ConstTensorRef stats, double max_norm, TensorRef factor) {
  const auto* stat = stats.data<double>();
  double result = 1;
  if (!std::all_of(stat, stat + stats.elements(), [](double x) { return std::isfinite(x); })) {
    result = std::numeric_limits<double>::quiet_NaN();
  } else if (const double norm = std::sqrt(stat[0]); max_norm > 0 && !(norm <= max_norm)) {
    result = max_norm / norm;
  }
  *factor.data<double>() = result;
  return absl::OkStatus();
}

template absl::Status AddInPlace<float>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddInPlace<double>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status Scale<float>(CpuTag, Context&, double, TensorRef);
template absl::Status Scale<double>(CpuTag, Context&, double, TensorRef);
template absl::Status RepeatRow<float>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status RepeatRow<double>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddSumOfSquares<float>(CpuTag, Context&, ConstTensorRef, TensorRef);
template absl::Status AddSumOfSquares<double>(CpuTag, Context&, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
