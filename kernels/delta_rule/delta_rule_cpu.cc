// Token after token: two passes over the state of a head, which stays in cache.

#include "kernels/common/segments.h"
#include "kernels/delta_rule/delta_step_cpu.h"

namespace annulus::kernels {
namespace {

// o[V] = S^T q
template <typename T>
void Read(const T* q, const T* s, int64_t key_dim, int64_t value_dim, T* o) {
  std::fill_n(o, value_dim, T{0});
  for (int64_t i = 0; i < key_dim; ++i) {
    const T* row = s + i * value_dim;
#pragma omp simd
    for (int64_t j = 0; j < value_dim; ++j) o[j] += q[i] * row[j];
  }
}

}  // namespace

template <typename T>
absl::Status DeltaSummary(CpuTag, Context& ctx, const DeltaRule& rule, const SegmentSummary& summary) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  T* u = ctx.scratch.Allocate(rule.k.dtype, {std::max(k, v)}).template data<T>();
  ForEachDeltaHead(rule, [&](int64_t segment, int64_t item, int64_t head, int64_t index) {
    DeltaTransition(ctx, rule, {.segment = segment, .item = item, .head = head}, u,
                    summary.transition.data<T>() + (segment * heads + index) * k * k);
    T* state = summary.state.data<T>() + (segment * heads + index) * k * v;
    std::fill_n(state, k * v, T{0});
    const RowRange rows = rule.segments[static_cast<size_t>(segment)];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (row % kDeltaPollRows == 0) ctx.Poll();
      const DeltaToken<T> t = TokenOf<T>(rule, row, item, head);
      DeltaResidual<T>(t, t.v, state, k, v, u);
      DeltaUpdate<T>(t, u, state, k, v, state);
    }
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status DeltaForward(CpuTag, Context& ctx, const DeltaRule& rule, ConstTensorRef initial,
                          TensorRef states, HeadsRef o) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  T* u = ctx.scratch.Allocate(rule.k.dtype, {v}).template data<T>();
  T* state = ctx.scratch.Allocate(rule.k.dtype, {k, v}).template data<T>();
  const std::vector<SegmentChunk> chunks = ChunksOf(rule.segments, rule.chunk);
  for (int64_t index = 0; index < heads; ++index) {
    const int64_t item = index / rule.k.heads, head = index % rule.k.heads;
    int64_t segment = -1;
    for (size_t c = 0; c < chunks.size(); ++c) {
      ctx.Poll();
      if (chunks[c].segment != segment) {
        segment = chunks[c].segment;
        if (initial.defined()) {
          std::copy_n(initial.data<T>() + (segment * heads + index) * k * v, k * v, state);
        } else {
          std::fill_n(state, k * v, T{0});
        }
      }
      std::copy_n(state, k * v, states.data<T>() + (static_cast<int64_t>(c) * heads + index) * k * v);
      for (int64_t row = chunks[c].rows.begin; row < chunks[c].rows.end; ++row) {
        const DeltaToken<T> t = TokenOf<T>(rule, row, item, head);
        DeltaResidual<T>(t, t.v, state, k, v, u);
        DeltaUpdate<T>(t, u, state, k, v, state);
        Read(t.q, state, k, v, HeadAt<T>(o, row, item, head));
      }
    }
  }
  return absl::OkStatus();
}

template absl::Status DeltaSummary<float>(CpuTag, Context&, const DeltaRule&, const SegmentSummary&);
template absl::Status DeltaSummary<double>(CpuTag, Context&, const DeltaRule&, const SegmentSummary&);
template absl::Status DeltaForward<float>(CpuTag, Context&, const DeltaRule&, ConstTensorRef, TensorRef,
                                          HeadsRef);
template absl::Status DeltaForward<double>(CpuTag, Context&, const DeltaRule&, ConstTensorRef, TensorRef,
                                           HeadsRef);

}  // namespace annulus::kernels
