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
absl::Status Rope(CpuTag, Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first) {
  const int64_t half = frequencies.pairs();
  const double scale = frequencies.scale, sign = direction == RopeDirection::kForward ? scale : -scale;
  ArenaScope scope(ctx.scratch);
  T* cosine = ctx.scratch.Allocate(x.dtype, {half}).template data<T>();
  T* sine = ctx.scratch.Allocate(x.dtype, {half}).template data<T>();
  for (int64_t row = 0; row < x.rows; ++row) {
    const double position = static_cast<double>(positions.data<int64_t>()[row]);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * frequencies.radians[static_cast<size_t>(i)];
      cosine[i] = static_cast<T>(scale * std::cos(angle));
      sine[i] = static_cast<T>(sign * std::sin(angle));
    }
    for (int64_t item = 0; item < x.batch; ++item) {
      T* heads = x.At<T>(item, 0) + row * x.row_stride + first;
      for (int64_t h = 0; h < x.heads; ++h) Turn(cosine, sine, half, heads + h * x.dim);
    }
  }
  return absl::OkStatus();
}

#define ANNULUS_INSTANTIATE(T)                                                                           \
  template absl::Status Rope<T>(CpuTag, Context&, ConstTensorRef, const RopeFrequencies&, RopeDirection, \
                                HeadsRef, int64_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(double);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
