// Taps are applied one after the other to rows of channels, with the weights transposed to [k, channels].

#include <algorithm>

#include "kernels/common/vector_math.h"
#include "kernels/conv1d/conv1d_kernels.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kTileRows = 64;  // between polls

template <typename T>
class Taps {
 public:
  Taps(Context& ctx, const Conv1d& conv)
      : conv_(conv), channels_(conv.w.dim(0)), k_(conv.w.dim(1)), w_(Transposed(ctx)) {}

  int64_t channels() const { return channels_; }
  int64_t k() const { return k_; }
  const T* weight(int64_t tap) const { return w_ + (k_ - 1 - tap) * channels_; }  // of x[t - tap]

  // Taps of a token that lie in its document.
  int64_t Count(int64_t row, int64_t item, int64_t batch) const {
    return std::min<int64_t>(k_, int64_t{conv_.ages.data<int32_t>()[row * batch + item]} + 1);
  }

  // Row `row - tap` of a segment that holds `row`, in x or in the halo. Of gradients the same.
  template <typename Byte>
  auto* At(const BasicHeadsRef<Byte>& x, const BasicTensorRef<Byte>& halo, size_t segment, int64_t row,
           int64_t item) const {
    const int64_t begin = conv_.segments[segment].begin;
    if (row >= begin) return x.template At<T>(item, 0) + row * x.row_stride;
    const int64_t halo_row = static_cast<int64_t>(segment) * (k_ - 1) + (k_ - 1) + (row - begin);
    return halo.template data<T>() + (halo_row * x.batch + item) * channels_;
  }

  // u = bias + sum over taps of w x
  void Apply(const ConstHeadsRef& x, size_t segment, int64_t row, int64_t item, T* u) const {
    if (conv_.bias.defined()) {
      std::copy_n(conv_.bias.data<T>(), channels_, u);
    } else {
      std::fill_n(u, channels_, T{0});
    }
    const int64_t count = Count(row, item, x.batch);
    for (int64_t tap = 0; tap < count; ++tap) {
      const T* in = At(x, conv_.halo, segment, row - tap, item);
      const T* w = weight(tap);
#pragma omp simd
      for (int64_t c = 0; c < channels_; ++c) u[c] += w[c] * in[c];
    }
  }

 private:
  T* Transposed(Context& ctx) const {
    T* to = ctx.scratch.Allocate(DTypeOf<T>(), {k_, channels_}).template data<T>();
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t j = 0; j < k_; ++j) to[j * channels_ + c] = conv_.w.data<T>()[c * k_ + j];
    }
    return to;
  }

  const Conv1d& conv_;
  const int64_t channels_, k_;
  const T* w_;  // [k, channels]
};

// Calls fn(segment, row, item) for every token, rows in order.
template <typename Fn>
void ForEachToken(const Context& ctx, const Conv1d& conv, int64_t batch, Fn&& fn) {
  for (size_t s = 0; s < conv.segments.size(); ++s) {
    for (int64_t row = conv.segments[s].begin; row < conv.segments[s].end; ++row) {
      if (row % kTileRows == 0) ctx.Poll();
      for (int64_t item = 0; item < batch; ++item) fn(s, row, item);
    }
  }
}

template <typename T>
void Zero(const HeadsRef& x) {
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t item = 0; item < x.batch; ++item) {
      std::fill_n(x.At<T>(item, 0) + row * x.row_stride, x.dim, T{0});
    }
  }
}

// du = dy silu'(u), in place of u
template <typename T>
void ThroughSilu(const T* dy, int64_t n, T* u) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T sigmoid = T{1} / (T{1} + Exp(-u[i]));
    u[i] = dy[i] * (sigmoid + u[i] * sigmoid * (T{1} - sigmoid));
  }
}

}  // namespace

template <typename T>
absl::Status Conv1dForward(CpuTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y) {
  ArenaScope scope(ctx.scratch);
  const Taps<T> taps(ctx, conv);
  ForEachToken(ctx, conv, x.batch, [&](size_t segment, int64_t row, int64_t item) {
    T* out = y.At<T>(item, 0) + row * y.row_stride;
    taps.Apply(x, segment, row, item, out);
#pragma omp simd
    for (int64_t c = 0; c < x.dim; ++c) out[c] = out[c] / (T{1} + Exp(-out[c]));
  });
  return absl::OkStatus();
}

// With u recomputed:  dx[t - j] += w_j du     dw_j += du x[t - j]     dbias += du
template <typename T>
absl::Status Conv1dBackward(CpuTag, Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  const Taps<T> taps(ctx, conv);
  const int64_t channels = taps.channels(), k = taps.k();
  T* du = ctx.scratch.Allocate(x.dtype, {channels}).template data<T>();
  T* dw = ctx.scratch.Allocate(x.dtype, {k, channels}).template data<T>();  // by tap
  std::fill_n(dw, k * channels, T{0});
  Zero<T>(gradients.dx);
  std::fill_n(gradients.dhalo.data<T>(), gradients.dhalo.elements(), T{0});
  T* dbias = ctx.scratch.Allocate(x.dtype, {channels}).template data<T>();
  std::fill_n(dbias, channels, T{0});
  ForEachToken(ctx, conv, x.batch, [&](size_t segment, int64_t row, int64_t item) {
    taps.Apply(x, segment, row, item, du);
    ThroughSilu(dy.At<T>(item, 0) + row * dy.row_stride, channels, du);
    const int64_t count = taps.Count(row, item, x.batch);
    for (int64_t tap = 0; tap < count; ++tap) {
      const T* in = taps.At(x, conv.halo, segment, row - tap, item);
      const T* w = taps.weight(tap);
      T* din = taps.At(gradients.dx, gradients.dhalo, segment, row - tap, item);
      T* dtap = dw + tap * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        din[c] += w[c] * du[c];
        dtap[c] += in[c] * du[c];
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) dbias[c] += du[c];
  });
  for (int64_t c = 0; c < channels; ++c) {
    if (conv.bias.defined()) gradients.dbias.data<T>()[c] += dbias[c];
    for (int64_t tap = 0; tap < k; ++tap) {
      gradients.dw.data<T>()[c * k + k - 1 - tap] += dw[tap * channels + c];
    }
  }
  return absl::OkStatus();
}

template absl::Status Conv1dForward<float>(CpuTag, Context&, const Conv1d&, ConstHeadsRef, HeadsRef);
template absl::Status Conv1dForward<double>(CpuTag, Context&, const Conv1d&, ConstHeadsRef, HeadsRef);
template absl::Status Conv1dBackward<float>(CpuTag, Context&, const Conv1d&, ConstHeadsRef, ConstHeadsRef,
                                            const Conv1dGradients&);
template absl::Status Conv1dBackward<double>(CpuTag, Context&, const Conv1d&, ConstHeadsRef, ConstHeadsRef,
                                             const Conv1dGradients&);

}  // namespace annulus::kernels
