// Backward of delta_chunk_cpu.h. With G the gradient of the state at the end of a chunk, P = D o Q K^T and
// R = V - f K S, so that (I + B) W = beta R:
//
//   dP = dO W^T      dW = P^T dO + (e K) G      dR = (I + B)^-T dW      dB = -dR W^T below the diagonal
//   dQ = (D o dP) K + f dO S^T                  dV = beta dR
//   dK = (D o dP)^T Q + e W G^T + (F + F^T) K - beta f dR S^T           F = beta D o dB
//   gradient at the start = (decay of the chunk) G + (f Q)^T dO - (beta f K)^T dR
//
// Gradients of decays as in ssd_backward_cpu.cc: what e^(sum_t - sum_s) gets goes to sum_t and is taken from
// sum_s.

#include "kernels/delta_rule/delta_chunk_cpu.h"

namespace annulus::kernels {
namespace {

// What both passes from the end do to G, in a chunk that is set.
template <typename T>
class Reverse {
 public:
  Reverse(Context& ctx, const DeltaRule& rule)
      : k_(rule.k.dim),
        v_(rule.v.dim),
        dw(RowsScratch<T>(ctx, DeltaLongestChunk(rule), rule.v.dim)),
        weights(RowsScratch<T>(ctx, DeltaLongestChunk(rule), DeltaLongestChunk(rule))),
        scaled_(RowsScratch<T>(ctx, DeltaLongestChunk(rule), rule.k.dim)) {}

  // dw = dR, weights = P
  void Solve(DeltaChunk<T>& chunk, const StridedRows<const T>& dout, const T* g) {
    ScaleRows<T>(chunk.size(), k_, [&](int64_t t) { return chunk.decay().ToEnd(t); }, chunk.k, scaled_);
    Multiply<T>({.m = chunk.size(), .n = v_, .k = k_}, scaled_, {g, v_}, {}, dw);
    chunk.QueryWeights(weights);
    LowerTransposedTimes<T>({.n = chunk.size(), .columns = v_}, weights, dout, Write::kAccumulate, dw);
    chunk.SolveTransposed(v_, dw);
  }

  // After Solve: g becomes the gradient at the start.
  void Advance(DeltaChunk<T>& chunk, const StridedRows<const T>& dout, T* g) {
    DeltaChunk<T>::Scale(chunk.decay().Whole(), k_ * v_, g);
    ScaleRows<T>(chunk.size(), k_, [&](int64_t t) { return chunk.decay().FromBefore(t); }, chunk.q, scaled_);
    const ProductForm add{.a = Transpose::kYes, .write = Write::kAccumulate};
    Multiply<T>({.m = k_, .n = v_, .k = chunk.size()}, scaled_, dout, add, {g, v_});
    ScaleRows<T>(
        chunk.size(), k_, [&](int64_t t) { return -chunk.beta(t) * chunk.decay().FromBefore(t); }, chunk.k,
        scaled_);
    Multiply<T>({.m = k_, .n = v_, .k = chunk.size()}, scaled_, dw, add, {g, v_});
  }

 private:
  const int64_t k_, v_;

 public:
  const StridedRows<T> dw;       // [rows, V]
  const StridedRows<T> weights;  // [rows, rows]

 private:
  const StridedRows<T> scaled_;  // [rows, K]
};

template <typename T>
class Gradients {
 public:
  Gradients(Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in, const DeltaGradients& out)
      : rule_(rule),
        in_(in),
        out_(out),
        k_(rule.k.dim),
        v_(rule.v.dim),
        chunk_(ctx, rule),
        reverse_(ctx, rule) {
    const int64_t longest = DeltaLongestChunk(rule);
    residual_ = RowsScratch<T>(ctx, longest, v_);
    writes_ = RowsScratch<T>(ctx, longest, v_);
    to_keys_ = RowsScratch<T>(ctx, longest, k_);
    pairs_ = RowsScratch<T>(ctx, longest, longest);
    dsum_ = ScratchElements<double>(ctx, longest);
    dbeta_ = ScratchElements<double>(ctx, longest);
  }

  // g: [K, V]: from the gradient at the end of the chunk to that at its start.   state: at its start
  void Run(const RowRange& rows, int64_t all_head, const T* state, T* g) {
    const int64_t item = all_head / rule_.k.heads, head = all_head % rule_.k.heads;
    chunk_.Set(rows, all_head);
    n_ = rows.size();
    do_ = HeadRows<T>(in_.do_, rows.begin, item, head);
    dq_ = HeadRows<T>(out_.dq, rows.begin, item, head);
    dk_ = HeadRows<T>(out_.dk, rows.begin, item, head);
    dv_ = HeadRows<T>(out_.dv, rows.begin, item, head);
    std::fill_n(dsum_, n_, 0.0);
    std::fill_n(dbeta_, n_, 0.0);
    chunk_.Residual(chunk_.v, state, v_, residual_);
    for (int64_t t = 0; t < n_; ++t) std::copy_n(residual_.at(t), v_, writes_.at(t));
    chunk_.Solve(v_, writes_);
    reverse_.Solve(chunk_, do_, g);
    ThroughReads();
    ThroughPairs();
    ThroughStart(state);
    ThroughEnd(state, g);
    reverse_.Advance(chunk_, do_, g);
    Store();
  }

 private:
  // o reads what the rows of the chunk wrote. Overwrites dq and dk.
  void ThroughReads() {
    LowerProduct<T>(n_, v_, do_, writes_, pairs_);
    for (int64_t t = 0; t < n_; ++t) {
      T* pairs = pairs_.at(t);
      AddLogDecays(t, pairs, reverse_.weights.at(t), t + 1);
#pragma omp simd
      for (int64_t s = 0; s <= t; ++s) pairs[s] *= chunk_.decays(t)[s];
      std::fill(pairs + t + 1, pairs + n_, T{0});
    }
    const LowerDims dims{.n = n_, .columns = k_};
    LowerTimes<T>(dims, pairs_, chunk_.k, Write::kOverwrite, dq_);
    LowerTransposedTimes<T>(dims, pairs_, chunk_.q, Write::kOverwrite, dk_);
  }

  // What a row writes depends on what those before it wrote: B. Here also v and beta.
  void ThroughPairs() {
    const StridedRows<T>& dr = reverse_.dw;
    LowerProduct<T>(n_, v_, dr, writes_, pairs_);  // -dB
    for (int64_t t = 0; t < n_; ++t) {
      T* pairs = pairs_.at(t);
      const T *decays = chunk_.decays(t), *keys = chunk_.keys(t);
      double dbeta = DotRow(dr.at(t), residual_.at(t), v_), dsum = 0;
#pragma omp simd reduction(+ : dbeta, dsum)
      for (int64_t s = 0; s < t; ++s) {
        pairs[s] *= -decays[s];
        const double without_beta = static_cast<double>(pairs[s] * keys[s]);
        dbeta += without_beta;
        dsum += without_beta * chunk_.beta(t);
        dsum_[s] -= without_beta * chunk_.beta(t);
        pairs[s] *= chunk_.beta(t);
      }
      dbeta_[t] += dbeta;
      dsum_[t] += dsum;
      std::fill(pairs + t, pairs + n_, T{0});
    }
    const LowerDims dims{.n = n_, .columns = k_};
    LowerTimes<T>(dims, pairs_, chunk_.k, Write::kAccumulate, dk_);
    LowerTransposedTimes<T>(dims, pairs_, chunk_.k, Write::kAccumulate, dk_);
    ScaleRows<T>(n_, v_, [&](int64_t t) { return chunk_.beta(t); }, dr, dv_);
  }

  // What the rows of the first document got from the state before the chunk: by q, and by k what they took
  // away, f K S = V - R.
  void ThroughStart(const T* state) {
    const ProductDims dims{.m = n_, .n = k_, .k = v_};
    const auto from_before = [&](int64_t t) { return chunk_.decay().FromBefore(t); };
    Multiply<T>(dims, do_, {state, v_}, {.b = Transpose::kYes}, to_keys_);
    AddScaledRows<T>(n_, k_, from_before, to_keys_, dq_);
    for (int64_t t = 0; t < n_; ++t) {
      dsum_[t] += from_before(t) * DotRow(chunk_.q.at(t), to_keys_.at(t), k_);
    }
    Multiply<T>(dims, dv_, {state, v_}, {.b = Transpose::kYes}, to_keys_);
    AddScaledRows<T>(n_, k_, [&](int64_t t) { return -from_before(t); }, to_keys_, dk_);
    for (int64_t t = 0; t < n_; ++t) {
      dsum_[t] -= from_before(t) * DotRow(chunk_.k.at(t), to_keys_.at(t), k_);
    }
  }

  // What the rows of the last document and the state before the chunk gave to the state after it.
  void ThroughEnd(const T* state, const T* g) {
    Multiply<T>({.m = n_, .n = k_, .k = v_}, writes_, {g, v_}, {.b = Transpose::kYes}, to_keys_);
    AddScaledRows<T>(n_, k_, [&](int64_t t) { return chunk_.decay().ToEnd(t); }, to_keys_, dk_);
    for (int64_t t = 0; t < n_; ++t) {
      const double by = chunk_.decay().ToEnd(t) * DotRow(chunk_.k.at(t), to_keys_.at(t), k_);
      dsum_[n_ - 1] += by;
      dsum_[t] -= by;
    }
    dsum_[n_ - 1] += static_cast<double>(chunk_.decay().Whole()) * DotRow(state, g, k_ * v_);
  }

  // Of row t's products with rows [0, count): gradient times value is the gradient of the logarithm.
  void AddLogDecays(int64_t t, const T* gradient, const T* value, int64_t count) {
    double dsum = 0;
#pragma omp simd reduction(+ : dsum)
    for (int64_t s = 0; s < count; ++s) {
      const auto by = static_cast<double>(gradient[s] * value[s]);
      dsum += by;
      dsum_[s] -= by;
    }
    dsum_[t] += dsum;
  }

  void Store() {
    chunk_.decay().StoreGradient(dsum_, out_.da.template data<T>());
    T* dbeta = out_.dbeta.template data<T>();
    for (int64_t t = 0; t < n_; ++t) dbeta[chunk_.decay().Gate(t)] = static_cast<T>(dbeta_[t]);
  }

  const DeltaRule& rule_;
  const DeltaBackwardInputs& in_;
  const DeltaGradients& out_;
  const int64_t k_, v_;
  DeltaChunk<T> chunk_;
  Reverse<T> reverse_;
  int64_t n_ = 0;
  StridedRows<T> residual_;  // [rows, V]: R
  StridedRows<T> writes_;    // [rows, V]: W
  StridedRows<T> to_keys_;   // [rows, K]
  StridedRows<T> pairs_;     // [rows, rows]
  double* dsum_;             // [rows]
  double* dbeta_;            // [rows]
  StridedRows<const T> do_;
  StridedRows<T> dq_, dk_, dv_;
};

}  // namespace

template <typename T>
absl::Status DeltaBackwardSummary(CpuTag, Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  DeltaChunk<T> chunk(ctx, rule);
  Reverse<T> reverse(ctx, rule);
  const StridedRows<T> writes = RowsScratch<T>(ctx, DeltaLongestChunk(rule), k);
  const std::vector<SegmentChunk> all = ChunksOf(rule.segments, rule.chunk);
  const auto transitions = [&](int64_t segment, int64_t head, const std::vector<int64_t>& chunks) {
    T* transition = summary.transition.data<T>() + (segment * heads + head) * k * k;
    SetIdentity(k, transition);
    for (const int64_t c : chunks) {
      chunk.Set(all[static_cast<size_t>(c)].rows, head);
      chunk.AdvanceTransition(writes, transition);
      ctx.Poll();
    }
  };
  const auto gradients = [&](int64_t segment, int64_t head, const std::vector<int64_t>& chunks) {
    T* g = summary.state.data<T>() + (segment * heads + head) * k * v;
    std::fill_n(g, k * v, T{0});
    for (const int64_t c : chunks) {
      const RowRange rows = all[static_cast<size_t>(c)].rows;
      const auto dout = HeadRows<T>(do_, rows.begin, head / rule.k.heads, head % rule.k.heads);
      chunk.Set(rows, head);
      reverse.Solve(chunk, dout, g);
      reverse.Advance(chunk, dout, g);
      ctx.Poll();
    }
  };
  ForEachSegmentHead(ctx, DeltaWalk(rule, ChunkOrder::kFromFirst), transitions);
  ForEachSegmentHead(ctx, DeltaWalk(rule, ChunkOrder::kFromLast), gradients);
  return absl::OkStatus();
}

template <typename T>
absl::Status DeltaBackward(CpuTag, Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in,
                           const DeltaGradients& out) {
  const int64_t size = rule.k.dim * rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  Gradients<T> gradients(ctx, rule, in, out);
  T* g = ScratchElements<T>(ctx, size);
  const std::vector<SegmentChunk> all = ChunksOf(rule.segments, rule.chunk);
  const auto run = [&](int64_t segment, int64_t head, const std::vector<int64_t>& chunks) {
    SetState(in.final_gradient, segment * heads + head, size, g);
    for (const int64_t c : chunks) {
      const T* state = in.states.data<T>() + (c * heads + head) * size;
      gradients.Run(all[static_cast<size_t>(c)].rows, head, state, g);
      ctx.Poll();
    }
  };
  ForEachSegmentHead(ctx, DeltaWalk(rule, ChunkOrder::kFromLast), run);
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
