// Angles, sines and cosines in double: at position 10^6 an f32 angle is off by 0.06 radians.

#include <cmath>

#include "kernels/rope/rope_kernels.h"

namespace annulus::kernels {
namespace {

// Turns the pairs (low[i], high[i]) of one head.
template <typename T>
void Turn(const T* cosine, const T* sine, int64_t half, T* low) {
  T* high = low + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const T a = low[i], b = high[i];
    low[i] = a * cosine[i] - b * sine[i];
    high[i] = a * sine[i] + b * cosine[i];
  }
}

}  // namespace

template <typename T>
absl::Status Rope(CpuTag, Context& ctx, ConstTensorRef positions, double theta, RopeDirection direction,
                  HeadsRef x) {
  const int64_t half = x.dim / 2;
  const double sign = direction == RopeDirection::kForward ? 1.0 : -1.0;
  ArenaScope scope(ctx.scratch);
  double* frequency = ctx.scratch.Allocate(DType::kF64, {half}).template data<double>();
  T* cosine = ctx.scratch.Allocate(x.dtype, {half}).template data<T>();
  T* sine = ctx.scratch.Allocate(x.dtype, {half}).template data<T>();
  for (int64_t i = 0; i < half; ++i) {
    frequency[i] = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(x.dim));
  }
  for (int64_t row = 0; row < x.rows; ++row) {
    const double position = static_cast<double>(positions.data<int64_t>()[row]);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * frequency[i];
      cosine[i] = static_cast<T>(std::cos(angle));
      sine[i] = static_cast<T>(sign * std::sin(angle));
    }
    for (int64_t item = 0; item < x.batch; ++item) {
      T* heads = x.At<T>(item, 0) + row * x.row_stride;
      for (int64_t h = 0; h < x.heads; ++h) Turn(cosine, sine, half, heads + h * x.dim);
    }
  }
  return absl::OkStatus();
}

template absl::Status Rope<float>(CpuTag, Context&, ConstTensorRef, double, RopeDirection, HeadsRef);
template absl::Status Rope<double>(CpuTag, Context&, ConstTensorRef, double, RopeDirection, HeadsRef);

}  // namespace annulus::kernels
