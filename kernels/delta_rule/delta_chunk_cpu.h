#pragma once

// The gated delta rule inside a chunk, on CPUs, as products of matrices (Yang et al., 2024). With D[t, s] the
// decay from row s to t, f those from before the chunk, e those to its end, S the state before it:
//
//   w_t = beta_t (v_t - f_t S^T k_t - sum over s < t of D[t, s] (k_s . k_t) w_s)      what row t writes
//
// that is (I + B) W = beta (V - f K S) with B = beta D o K K^T strictly below the diagonal, and
//
//   O = f Q S + (D o Q K^T) W        S at the end = (decay of the chunk) S + (e K)^T W
//
// Without values and from the identity the same gives the transition of the chunk.

#include "kernels/common/chunk_decay_cpu.h"
#include "kernels/common/rows_cpu.h"
#include "kernels/common/segments.h"
#include "kernels/delta_rule/delta_rule_kernels.h"

namespace annulus::kernels {

inline int64_t DeltaLongestChunk(const DeltaRule& rule) { return std::min(rule.chunk, rule.k.rows); }

template <typename T>
void SetIdentity(int64_t n, T* matrix) {
  std::fill_n(matrix, n * n, T{0});
  for (int64_t i = 0; i < n; ++i) matrix[i * n + i] = T{1};
}

template <typename T>
class DeltaChunk {
 public:
  DeltaChunk(Context& ctx, const DeltaRule& rule)
      : rule_(rule), decay_(ctx, rule.a, rule.ages, DeltaLongestChunk(rule)) {
    const int64_t longest = DeltaLongestChunk(rule);
    decays_ = RowsScratch<T>(ctx, longest, longest);
    keys_ = RowsScratch<T>(ctx, longest, longest);
    lower_ = RowsScratch<T>(ctx, longest, longest);
    scaled_ = RowsScratch<T>(ctx, longest, rule.k.dim);
    beta_ = ScratchElements<T>(ctx, longest);
  }

  // head: in batch * heads
  void Set(const RowRange& rows, int64_t all_head) {
    const int64_t item = all_head / rule_.k.heads, head = all_head % rule_.k.heads;
    n_ = rows.size();
    decay_.SetRows(rows, item);
    decay_.SetHead(head);
    q = HeadRows<T>(rule_.q, rows.begin, item, head);
    k = HeadRows<T>(rule_.k, rows.begin, item, head);
    v = HeadRows<T>(rule_.v, rows.begin, item, head);
    LowerProduct<T>(n_, rule_.k.dim, k, k, keys_);
    for (int64_t t = 0; t < n_; ++t) {
      beta_[t] = rule_.beta.data<T>()[decay_.Gate(t)];
      T* decays = decays_.at(t);
      std::fill_n(decays, n_, T{0});
      decay_.To(t, decays);
#pragma omp simd
      for (int64_t s = 0; s < t; ++s) lower_.at(t)[s] = beta_[t] * decays[s] * keys_.at(t)[s];
    }
  }

  int64_t size() const { return n_; }
  const ChunkDecay<T>& decay() const { return decay_; }
  T beta(int64_t row) const { return beta_[row]; }
  const T* decays(int64_t row) const { return decays_.at(row); }  // to it, 0 where there is none; [size]
  const T* keys(int64_t row) const { return keys_.at(row); }      // k_row . k_s below the diagonal

  // writes = V - f K S, without V where v_or_none is null.   state: [K, columns]
  void Residual(const StridedRows<const T>& v_or_none, const T* state, int64_t columns,
                const StridedRows<T>& writes) {
    ScaleRows<T>(n_, rule_.k.dim, [&](int64_t t) { return -decay_.FromBefore(t); }, k, scaled_);
    for (int64_t t = 0; t < n_; ++t) {
      if (v_or_none.data != nullptr) {
        std::copy_n(v_or_none.at(t), columns, writes.at(t));
      } else {
        std::fill_n(writes.at(t), columns, T{0});
      }
    }
    Multiply<T>({.m = n_, .n = columns, .k = rule_.k.dim}, scaled_, {state, columns},
                {.write = Write::kAccumulate}, writes);
  }

  // writes = (I + B)^-1 beta writes
  void Solve(int64_t columns, const StridedRows<T>& writes) {
    ScaleRows<T>(n_, columns, [&](int64_t t) { return beta_[t]; }, writes, writes);
    SolveUnitLower<T>(n_, columns, {lower_.data, lower_.stride}, writes.data, writes.stride);
  }
  // The adjoint without beta: x = (I + B)^-T x
  void SolveTransposed(int64_t columns, const StridedRows<T>& x) {
    SolveUnitLower<T>(n_, columns, {lower_.data, lower_.stride, Transpose::kYes}, x.data, x.stride);
  }

  // weights = D o Q K^T, zeros above the diagonal
  void QueryWeights(const StridedRows<T>& weights) {
    LowerProduct<T>(n_, rule_.k.dim, q, k, weights);
    for (int64_t t = 0; t < n_; ++t) {
#pragma omp simd
      for (int64_t s = 0; s <= t; ++s) weights.at(t)[s] *= decays_.at(t)[s];
      std::fill(weights.at(t) + t + 1, weights.at(t) + n_, T{0});
    }
  }

  // The chunk without values, on a transition [K, K].   writes: [rows, K], scratch
  void AdvanceTransition(const StridedRows<T>& writes, T* transition) {
    Residual({}, transition, rule_.k.dim, writes);
    Solve(rule_.k.dim, writes);
    Advance(writes, rule_.k.dim, transition);
  }

  // state = (decay of the chunk) state + (e K)^T writes.   state: [K, columns]
  void Advance(const StridedRows<const T>& writes, int64_t columns, T* state) {
    ScaleRows<T>(n_, rule_.k.dim, [&](int64_t t) { return decay_.ToEnd(t); }, k, scaled_);
    Scale(decay_.Whole(), rule_.k.dim * columns, state);
    Multiply<T>({.m = rule_.k.dim, .n = columns, .k = n_}, scaled_, writes,
                {.a = Transpose::kYes, .write = Write::kAccumulate}, {state, columns});
  }

  static void Scale(T factor, int64_t n, T* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  }

  StridedRows<const T> q, k, v;  // of the chunk and head

 private:
  const DeltaRule& rule_;
  ChunkDecay<T> decay_;
  int64_t n_ = 0;
  StridedRows<T> decays_;  // [rows, rows]
  StridedRows<T> keys_;    // [rows, rows], lower half
  StridedRows<T> lower_;   // B
  StridedRows<T> scaled_;  // [rows, K]
  T* beta_;                // [rows]
};

inline ChunkWalk DeltaWalk(const DeltaRule& rule, ChunkOrder order) {
  return {
      .segments = rule.segments, .chunk = rule.chunk, .heads = rule.k.batch * rule.k.heads, .order = order};
}

}  // namespace annulus::kernels
