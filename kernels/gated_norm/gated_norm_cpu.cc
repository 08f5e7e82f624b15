// In one form for all kinds: with a = silu(gate) or sigmoid(gate),
//   kSiluBefore        v = x a    up = w dy
//   kSiluAfter, ..     v = x      up = w dy a
// and r the inverse norm of v, dv = r (up - v r^2 mean(up v)).
// Two passes over a tile of tokens: sums over the columns of a group, then what needs them.

#include <algorithm>
#include <cmath>

#include "kernels/common/vector_math.h"
#include "kernels/gated_norm/gated_norm_kernels.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kTileTokens = 16;  // that stay in cache between the passes

template <typename T>
T Sigmoid(T x) {
  return T{1} / (T{1} + Exp(-x));
}

template <typename T, Gate kKind>
T Activation(T gate) {
  return kKind == Gate::kSigmoidAfter ? Sigmoid(gate) : gate * Sigmoid(gate);
}

template <typename T, Gate kKind>
T Slope(T gate) {
  const T s = Sigmoid(gate);
  return kKind == Gate::kSigmoidAfter ? s * (T{1} - s) : s + gate * s * (T{1} - s);
}

template <typename T>
struct GroupRow {
  const T *x, *gate, *w;
};

template <typename T, Gate kKind>
class Rows {
 public:
  static constexpr bool kBefore = kKind == Gate::kSiluBefore;

  explicit Rows(const GatedNorm& norm)
      : norm_(norm), size_(norm.x.cols / norm.groups), shared_(norm.w.dim(0) != norm.x.cols) {}

  // A group's columns of a token.
  template <typename Byte>
  auto* At(const BasicMatrixRef<Byte>& m, int64_t token, int64_t group) const {
    using Pointee = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return static_cast<Pointee*>(m.data) + token * m.stride + group * size_;
  }
  GroupRow<T> In(int64_t token, int64_t group) const {
    return {At(norm_.x, token, group), At(norm_.gate, token, group), norm_.w.data<T>() + Weight(group)};
  }

  T Square(const GroupRow<T>& in) const {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size_; ++i) {
      const T v = kBefore ? in.x[i] * Activation<T, kKind>(in.gate[i]) : in.x[i];
      sum += v * v;
    }
    return sum;
  }

  // sum of up v = w dy x a, whatever the kind
  T Dot(const GroupRow<T>& in, const T* dy) const {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size_; ++i) {
      sum += in.w[i] * dy[i] * in.x[i] * Activation<T, kKind>(in.gate[i]);
    }
    return sum;
  }

  T Inverse(T square) const {
    return T{1} / std::sqrt(square / static_cast<T>(norm_.group_columns) + static_cast<T>(norm_.eps));
  }

  void Apply(const GroupRow<T>& in, T square, T* y) const {
    const T r = Inverse(square);
#pragma omp simd
    for (int64_t i = 0; i < size_; ++i) y[i] = in.w[i] * (in.x[i] * r) * Activation<T, kKind>(in.gate[i]);
  }

  void ApplyBackward(const GatedNormGradients& out, int64_t token, int64_t group, T square, T dot) const {
    const GroupRow<T> in = In(token, group);
    const T* dy = At(out.dy, token, group);
    T* dx = At(out.dx, token, group);
    T* dgate = At(out.dgate, token, group);
    T* dw = out.dw.template data<T>() + Weight(group);
    const T r = Inverse(square), along = dot * r * r / static_cast<T>(norm_.group_columns);
#pragma omp simd
    for (int64_t i = 0; i < size_; ++i) {
      const T a = Activation<T, kKind>(in.gate[i]), slope = Slope<T, kKind>(in.gate[i]);
      const T x = in.x[i], weighted = in.w[i] * dy[i];
      const T v = kBefore ? x * a : x;
      const T dv = r * ((kBefore ? weighted : weighted * a) - along * v);
      dw[i] += dy[i] * (x * a * r);
      dx[i] = kBefore ? dv * a : dv;
      dgate[i] = (kBefore ? dv * x : weighted * (x * r)) * slope;
    }
  }

 private:
  int64_t Weight(int64_t group) const { return shared_ ? 0 : group * size_; }

  const GatedNorm& norm_;
  const int64_t size_;  // of a group here
  const bool shared_;   // one weight for all groups
};

template <typename Fn>
absl::Status VisitGate(Gate kind, Fn&& fn) {
  switch (kind) {
    case Gate::kSiluBefore:
      return fn.template operator()<Gate::kSiluBefore>();
    case Gate::kSiluAfter:
      return fn.template operator()<Gate::kSiluAfter>();
    case Gate::kSigmoidAfter:
      return fn.template operator()<Gate::kSigmoidAfter>();
  }
  return Invalid("gated_norm.kind=", static_cast<int>(kind), ": expected a Gate");
}

// sums(token, group, T* of `kinds` sums, `groups` apart) fills, apply(token, group, the same) uses sums of
// all ranks. With a sum over ranks the tokens are one tile.
template <typename T, typename Sums, typename ApplyFn>
absl::Status InTwoPasses(Context& ctx, const GatedNorm& norm, int64_t kinds, const Sums& sums,
                         const ApplyFn& apply) {
  const int64_t tokens = norm.x.rows, width = kinds * norm.groups;
  const int64_t tile = norm.sum_over_ranks ? tokens : std::min(tokens, kTileTokens);
  ArenaScope scope(ctx.scratch);
  const TensorRef memory = ctx.scratch.Allocate(DTypeOf<T>(), {tile, width});
  T* sum = memory.data<T>();
  for (int64_t begin = 0; begin < tokens; begin += tile) {
    const int64_t end = std::min(begin + tile, tokens);
    const auto for_each = [&](const auto& fn) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t g = 0; g < norm.groups; ++g) fn(t, g, sum + (t - begin) * width + g);
        if ((t + 1) % kTileTokens == 0) ctx.Poll();
      }
    };
    for_each(sums);
    if (norm.sum_over_ranks) ANNULUS_RETURN_IF_ERROR(norm.sum_over_ranks(memory));
    for_each(apply);
  }
  return absl::OkStatus();
}

}  // namespace

template <typename T>
absl::Status GatedNormForward(CpuTag, Context& ctx, const GatedNorm& norm, MatrixRef y) {
  return VisitGate(norm.kind, [&]<Gate kKind>() {
    const Rows<T, kKind> rows(norm);
    return InTwoPasses<T>(
        ctx, norm, 1, [&](int64_t t, int64_t g, T* sum) { *sum = rows.Square(rows.In(t, g)); },
        [&](int64_t t, int64_t g, const T* sum) { rows.Apply(rows.In(t, g), *sum, rows.At(y, t, g)); });
  });
}

template <typename T>
absl::Status GatedNormBackward(CpuTag, Context& ctx, const GatedNorm& norm,
                               const GatedNormGradients& gradients) {
  return VisitGate(norm.kind, [&]<Gate kKind>() {
    const Rows<T, kKind> rows(norm);
    const int64_t groups = norm.groups;
    return InTwoPasses<T>(
        ctx, norm, 2,
        [&](int64_t t, int64_t g, T* sum) {
          sum[0] = rows.Square(rows.In(t, g));
          sum[groups] = rows.Dot(rows.In(t, g), rows.At(gradients.dy, t, g));
        },
        [&](int64_t t, int64_t g, const T* sum) {
          rows.ApplyBackward(gradients, t, g, sum[0], sum[groups]);
        });
  });
}

template absl::Status GatedNormForward<float>(CpuTag, Context&, const GatedNorm&, MatrixRef);
template absl::Status GatedNormForward<double>(CpuTag, Context&, const GatedNorm&, MatrixRef);
template absl::Status GatedNormBackward<float>(CpuTag, Context&, const GatedNorm&, const GatedNormGradients&);
template absl::Status GatedNormBackward<double>(CpuTag, Context&, const GatedNorm&,
                                                const GatedNormGradients&);

}  // namespace annulus::kernels
