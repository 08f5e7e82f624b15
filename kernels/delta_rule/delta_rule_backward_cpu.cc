// With G the gradient of S_t from later tokens and q_t do_t^T:
//
//   dq = S_t do      dv = du = beta G^T k      dbeta = k^T G u      dk = beta G u - g S_{t-1} du
//   dSg = G - k du^T      da = <dSg, g S_{t-1}>      G <- g dSg
//
// S_{t-1} of the tokens of a chunk is computed again from the state at its start.

#include "kernels/common/segments.h"
#include "kernels/delta_rule/delta_step_cpu.h"

namespace annulus::kernels {
namespace {

template <typename T>
class Backward {
 public:
  Backward(Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in, const DeltaGradients& out)
      : ctx_(ctx), rule_(rule), in_(in), out_(out), k_(rule.k.dim), v_(rule.v.dim) {
    states_ = Scratch((std::min(rule.chunk, rule.k.rows) + 1) * k_ * v_);
    g_ = Scratch(k_ * v_);
    u_ = Scratch(v_);
    du_ = Scratch(v_);
  }

  void Run(int64_t item, int64_t head) {
    const int64_t heads = rule_.k.batch * rule_.k.heads, index = item * rule_.k.heads + head;
    const std::vector<SegmentChunk> chunks = ChunksOf(rule_.segments, rule_.chunk);
    int64_t segment = -1;
    for (int64_t c = static_cast<int64_t>(chunks.size()) - 1; c >= 0; --c) {
      const SegmentChunk& chunk = chunks[static_cast<size_t>(c)];
      if (chunk.segment != segment) {
        segment = chunk.segment;
        if (in_.final_gradient.defined()) {
          std::copy_n(in_.final_gradient.data<T>() + (segment * heads + index) * k_ * v_, k_ * v_, g_);
        } else {
          std::fill_n(g_, k_ * v_, T{0});
        }
      }
      std::copy_n(in_.states.data<T>() + (c * heads + index) * k_ * v_, k_ * v_, states_);
      StatesOf(chunk.rows, item, head);
      for (int64_t row = chunk.rows.end - 1; row >= chunk.rows.begin; --row) {
        Token(row, item, head, states_ + (row - chunk.rows.begin) * k_ * v_);
      }
      ctx_.Poll();
    }
  }

 private:
  T* Scratch(int64_t elements) { return ctx_.scratch.Allocate(DTypeOf<T>(), {elements}).template data<T>(); }

  // states_[i]: before row i of the chunk.
  void StatesOf(const RowRange& rows, int64_t item, int64_t head) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const DeltaToken<T> t = TokenOf<T>(rule_, row, item, head);
      T* before = states_ + (row - rows.begin) * k_ * v_;
      DeltaResidual<T>(t, t.v, before, k_, v_, u_);
      DeltaUpdate<T>(t, u_, before, k_, v_, before + k_ * v_);
    }
  }

  // before: S_{t-1}; S_t follows it.
  void Token(int64_t row, int64_t item, int64_t head, const T* before) {
    const DeltaToken<T> t = TokenOf<T>(rule_, row, item, head);
    const T* do_ = HeadAt<T>(in_.do_, row, item, head);
    T* dq = HeadAt<T>(out_.dq, row, item, head);
    T* dk = HeadAt<T>(out_.dk, row, item, head);
    DeltaResidual<T>(t, t.v, before, k_, v_, u_);
    std::fill_n(du_, v_, T{0});
    T dbeta = 0;
    for (int64_t i = 0; i < k_; ++i) {
      T* g = g_ + i * v_;
      const T* after = before + (k_ + i) * v_;
      const T write = t.beta * t.k[i], q = t.q[i];
      T along_u = 0, read = 0;
#pragma omp simd reduction(+ : along_u, read)
      for (int64_t j = 0; j < v_; ++j) {
        read += after[j] * do_[j];
        g[j] += q * do_[j];
        along_u += g[j] * u_[j];
        du_[j] += write * g[j];
      }
      dq[i] = read;
      dk[i] = t.beta * along_u;
      dbeta += t.k[i] * along_u;
    }
    T da = 0;
    for (int64_t i = 0; i < k_; ++i) {
      T* g = g_ + i * v_;
      const T* s = before + i * v_;
      T along_du = 0;
#pragma omp simd reduction(+ : along_du, da)
      for (int64_t j = 0; j < v_; ++j) {
        const T decayed = t.g * s[j], dsg = g[j] - t.k[i] * du_[j];
        along_du += decayed * du_[j];
        da += dsg * decayed;
        g[j] = t.g * dsg;
      }
      dk[i] -= along_du;
    }
    std::copy_n(du_, v_, HeadAt<T>(out_.dv, row, item, head));
    const int64_t gate = (row * rule_.k.batch + item) * rule_.k.heads + head;
    out_.dbeta.data<T>()[gate] = dbeta;
    out_.da.data<T>()[gate] = da;
  }

  Context& ctx_;
  const DeltaRule& rule_;
  const DeltaBackwardInputs& in_;
  const DeltaGradients& out_;
  const int64_t k_, v_;
  T* states_;  // [rows of a chunk + 1, K, V]
  T* g_;       // [K, V]
  T* u_;       // [V]
  T* du_;      // [V]
};

}  // namespace

// The same recurrence from the end, read through q and written through do:
//   G <- G + q do^T      G <- g (I - beta k k^T) G
template <typename T>
absl::Status DeltaBackwardSummary(CpuTag, Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  T* u = ctx.scratch.Allocate(rule.k.dtype, {std::max(k, v)}).template data<T>();
  ForEachDeltaHead(rule, [&](int64_t segment, int64_t item, int64_t head, int64_t index) {
    DeltaTransition(ctx, rule, {.segment = segment, .item = item, .head = head}, u,
                    summary.transition.data<T>() + (segment * heads + index) * k * k);
    T* g = summary.state.data<T>() + (segment * heads + index) * k * v;
    std::fill_n(g, k * v, T{0});
    const RowRange rows = rule.segments[static_cast<size_t>(segment)];
    for (int64_t row = rows.end - 1; row >= rows.begin; --row) {
      if (row % kDeltaPollRows == 0) ctx.Poll();
      const DeltaToken<T> t = TokenOf<T>(rule, row, item, head);
      const T* up = HeadAt<T>(do_, row, item, head);
      for (int64_t i = 0; i < k; ++i) {
#pragma omp simd
        for (int64_t j = 0; j < v; ++j) g[i * v + j] += t.q[i] * up[j];
      }
      DeltaResidual<T>(t, nullptr, g, k, v, u);
      DeltaUpdate<T>(t, u, g, k, v, g);
    }
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status DeltaBackward(CpuTag, Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in,
                           const DeltaGradients& out) {
  ArenaScope scope(ctx.scratch);
  Backward<T> backward(ctx, rule, in, out);
  for (int64_t item = 0; item < rule.k.batch; ++item) {
    for (int64_t head = 0; head < rule.k.heads; ++head) backward.Run(item, head);
  }
  return absl::OkStatus();
}

template absl::Status DeltaBackwardSummary<float>(CpuTag, Context&, const DeltaRule&, ConstHeadsRef,
                                                  const SegmentSummary&);
template absl::Status DeltaBackwardSummary<double>(CpuTag, Context&, const DeltaRule&, ConstHeadsRef,
                                                   const SegmentSummary&);
template absl::Status DeltaBackward<float>(CpuTag, Context&, const DeltaRule&, const DeltaBackwardInputs&,
                                           const DeltaGradients&);
template absl::Status DeltaBackward<double>(CpuTag, Context&, const DeltaRule&, const DeltaBackwardInputs&,
                                            const DeltaGradients&);

}  // namespace annulus::kernels
