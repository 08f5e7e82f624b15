// Backward of the scan. Inside a chunk, with W the decays between rows, M = (C B^T) o W dt and G the gradient
// of the state at its end:
//
//   dM = dY X^T     dX = M^T dY + w dt (B G) + skip dY     E = dM o M
//   d(C B^T) = dM o W dt, summed over the heads of a group before it meets B and C
//   dB = d(C B^T)^T C + (w dt X) G^T     dC = d(C B^T) B + (decay from before) dY h_in^T
//
// A decay is e^(sum_t - sum_s): what it gets goes to sum_t and is taken from sum_s, and a_t gets all that
// later rows of its document got. These terms cancel where a row lies outside of [s, t], so they are summed
// in double.

#include "kernels/ssd/ssd_chunk_cpu.h"

namespace annulus::kernels {
namespace {

template <typename T>
class Gradients {
 public:
  Gradients(Context& ctx, const Ssd& ssd, const SsdBackwardStates& in, const SsdGradients& out)
      : ssd_(ssd), in_(in), out_(out), decay_(ctx, ssd.a, ssd.ages, SsdLongestChunk(ssd)) {
    const int64_t longest = SsdLongestChunk(ssd), p = ssd.x.dim, n = ssd.b.dim;
    products_ = RowsScratch<T>(ctx, longest, longest);
    dproducts_ = RowsScratch<T>(ctx, longest, longest);
    weights_ = RowsScratch<T>(ctx, longest, longest);
    scaled_ = RowsScratch<T>(ctx, longest, p);
    to_end_ = RowsScratch<T>(ctx, longest, p);
    from_start_ = RowsScratch<T>(ctx, longest, n);
    decays_ = ScratchElements<T>(ctx, longest);
    steps_ = ScratchElements<T>(ctx, longest);
    dsum_ = ScratchElements<double>(ctx, longest);
    dstep_ = ScratchElements<double>(ctx, longest);
    dskip_ = ScratchElements<double>(ctx, ssd.x.heads);
    std::fill_n(dskip_, ssd.x.heads, 0.0);
  }

  void BeginGroup(const RowRange& rows, int64_t item, int64_t group) {
    rows_ = rows;
    n_ = rows.size();
    item_ = item;
    decay_.SetRows(rows, item);
    b_ = HeadRows<T>(ssd_.b, rows.begin, item, group);
    c_ = HeadRows<T>(ssd_.c, rows.begin, item, group);
    db_ = HeadRows<T>(out_.db, rows.begin, item, group);
    dc_ = HeadRows<T>(out_.dc, rows.begin, item, group);
    LowerProduct<T>(n_, ssd_.b.dim, c_, b_, products_);
    std::fill_n(dproducts_.data, n_ * dproducts_.stride, T{0});
    for (int64_t r = 0; r < n_; ++r) {
      std::fill_n(db_.at(r), ssd_.b.dim, T{0});
      std::fill_n(dc_.at(r), ssd_.c.dim, T{0});
    }
  }

  void Run(int64_t chunk, int64_t head) {
    decay_.SetHead(head);
    x_ = HeadRows<T>(ssd_.x, rows_.begin, item_, head);
    dy_ = HeadRows<T>(in_.dy, rows_.begin, item_, head);
    dx_ = HeadRows<T>(out_.dx, rows_.begin, item_, head);
    for (int64_t r = 0; r < n_; ++r) steps_[r] = SsdStep<T>(ssd_, decay_.Gate(r));
    std::fill_n(dsum_, n_, 0.0);
    std::fill_n(dstep_, n_, 0.0);
    const int64_t index = chunk * ssd_.x.batch * ssd_.x.heads + item_ * ssd_.x.heads + head;
    const int64_t size = ssd_.b.dim * ssd_.x.dim;
    const T* state = in_.states.states.template data<T>() + index * size;
    const T* gradient = in_.gradients.data<T>() + index * size;
    Inside();
    ThroughEnd(gradient);
    ThroughStart(state);
    dsum_[n_ - 1] += static_cast<double>(decay_.Whole()) * DotRow(state, gradient, size);
    if (ssd_.skip.defined()) Skip(head);
    decay_.StoreGradient(dsum_, out_.da.template data<T>());
    if (!ssd_.dt.defined()) return;
    T* ddt = out_.ddt.template data<T>();
    for (int64_t r = 0; r < n_; ++r) ddt[decay_.Gate(r)] = static_cast<T>(dstep_[r]);
  }

  void EndGroup() {
    const LowerDims dims{.n = n_, .columns = ssd_.b.dim};
    LowerTransposedTimes<T>(dims, dproducts_, c_, Write::kAccumulate, db_);
    LowerTimes<T>(dims, dproducts_, b_, Write::kAccumulate, dc_);
  }

  void AddSkipGradients() {
    if (!ssd_.skip.defined()) return;
    T* dskip = out_.dskip.template data<T>();
    for (int64_t h = 0; h < ssd_.x.heads; ++h) dskip[h] += static_cast<T>(dskip_[h]);
  }

 private:
  void Inside() {
    LowerProduct<T>(n_, ssd_.x.dim, dy_, x_, weights_);
    ForEachPanel(n_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) InsideRow(t, end);
    });
    LowerTransposedTimes<T>({.n = n_, .columns = ssd_.x.dim}, weights_, dy_, Write::kOverwrite, dx_);
  }

  // Row t of the weights: from dy x to M, of which the product reads columns [0, end).
  void InsideRow(int64_t t, int64_t end) {
    const int64_t start = decay_.start(t);
    const T* products = products_.at(t);
    T* dproducts = dproducts_.at(t);
    T* weights = weights_.at(t);
    decay_.To(t, decays_);
    double dsum = 0;
#pragma omp simd reduction(+ : dsum)
    for (int64_t s = start; s <= t; ++s) {
      const T decay = decays_[s], step = steps_[s];
      const double without_step = static_cast<double>(weights[s] * decay * products[s]);
      dproducts[s] += weights[s] * decay * step;
      weights[s] = products[s] * decay * step;
      dstep_[s] += without_step;
      dsum += without_step * step;
      dsum_[s] -= without_step * step;
    }
    dsum_[t] += dsum;
    std::fill_n(weights, start, T{0});
    std::fill(weights + t + 1, weights + end, T{0});
  }

  // What the rows of the last document give to the end state.
  void ThroughEnd(const T* gradient) {
    const int64_t last = decay_.last(), count = n_ - last, p = ssd_.x.dim, n = ssd_.b.dim;
    const auto factor = [&](int64_t r) { return decay_.ToEnd(last + r) * steps_[last + r]; };
    Multiply<T>({.m = count, .n = p, .k = n}, b_.From(last), {gradient, p}, {}, to_end_);
    AddScaledRows<T>(count, p, factor, to_end_, dx_.From(last));
    for (int64_t r = last; r < n_; ++r) {
      const double without_step = decay_.ToEnd(r) * DotRow(x_.at(r), to_end_.at(r - last), p);
      dstep_[r] += without_step;
      dsum_[r] -= without_step * steps_[r];
      dsum_[n_ - 1] += without_step * steps_[r];
    }
    ScaleRows<T>(count, p, factor, x_.From(last), scaled_);
    Multiply<T>({.m = count, .n = n, .k = p}, scaled_, {gradient, p},
                {.b = Transpose::kYes, .write = Write::kAccumulate}, db_.From(last));
  }

  // What the rows of the first document got from the start state.
  void ThroughStart(const T* state) {
    const int64_t carried = decay_.carried(), p = ssd_.x.dim, n = ssd_.c.dim;
    ScaleRows<T>(carried, p, [&](int64_t r) { return decay_.FromBefore(r); }, dy_, scaled_);
    Multiply<T>({.m = carried, .n = n, .k = p}, scaled_, {state, p}, {.b = Transpose::kYes}, from_start_);
    AddScaledRows<T>(carried, n, [](int64_t) { return T{1}; }, from_start_, dc_);
    for (int64_t r = 0; r < carried; ++r) dsum_[r] += DotRow(c_.at(r), from_start_.at(r), n);
  }

  void Skip(int64_t head) {
    const T skip = ssd_.skip.template data<T>()[head];
    AddScaledRows<T>(n_, ssd_.x.dim, [&](int64_t) { return skip; }, dy_, dx_);
    for (int64_t r = 0; r < n_; ++r) dskip_[head] += DotRow(x_.at(r), dy_.at(r), ssd_.x.dim);
  }

  const Ssd& ssd_;
  const SsdBackwardStates& in_;
  const SsdGradients& out_;
  ChunkDecay<T> decay_;
  StridedRows<T> products_;    // [rows, rows] of c and b, lower half
  StridedRows<T> dproducts_;   // [rows, rows], over the heads of a group
  StridedRows<T> weights_;     // [rows, rows] products of dy and x, then M
  StridedRows<T> scaled_;      // [rows, head_dim]
  StridedRows<T> to_end_;      // [rows, head_dim]: b and the end state's gradient
  StridedRows<T> from_start_;  // [rows, state]: decayed dy and the start state
  T* decays_;                  // [rows]: to one row
  T* steps_;                   // [rows]: dt
  double* dsum_;               // [rows]
  double* dstep_;              // [rows]
  double* dskip_;              // [heads]
  RowRange rows_;
  int64_t n_ = 0, item_ = 0;
  StridedRows<const T> b_, c_, x_, dy_;
  StridedRows<T> db_, dc_, dx_;
};

}  // namespace

template <typename T>
absl::Status SsdBackwardChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, p = ssd.x.dim, n = ssd.b.dim;
  ArenaScope scope(ctx.scratch);
  ChunkDecay<T> decay(ctx, ssd.a, ssd.ages, SsdLongestChunk(ssd));
  const StridedRows<T> outputs = RowsScratch<T>(ctx, SsdLongestChunk(ssd), p);
  ForEachChunkHead(ctx, ssd, [&](int64_t chunk, const RowRange& rows, int64_t item, int64_t head) {
    const int64_t out = chunk * heads + item * ssd.x.heads + head;
    if (head == 0) decay.SetRows(rows, item);
    decay.SetHead(head);
    ScaleRows<T>(
        decay.carried(), p, [&](int64_t r) { return decay.FromBefore(r); },
        HeadRows<T>(in.dy, rows.begin, item, head), outputs);
    Multiply<T>({.m = n, .n = p, .k = decay.carried()},
                HeadRows<T>(ssd.c, rows.begin, item, SsdGroup(ssd, head)), outputs, {.a = Transpose::kYes},
                {in.gradients.data<T>() + out * n * p, p});
  });
  SummariseChunks<T>(ctx, ssd, ChunkOrder::kFromLast, {in.gradients, in.states.decays}, summary);
  return absl::OkStatus();
}

template <typename T>
absl::Status SsdBackward(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         ConstTensorRef final_gradient, const SsdGradients& out) {
  // Of each chunk's own y at its start: from here on of its end state.
  ChainChunks<T>(ctx, ssd, ChunkOrder::kFromLast, final_gradient, {in.gradients, in.states.decays});
  ArenaScope scope(ctx.scratch);
  Gradients<T> gradients(ctx, ssd, in, out);
  const int64_t group_heads = ssd.x.heads / ssd.b.heads;
  ForEachChunkHead(ctx, ssd, [&](int64_t chunk, const RowRange& rows, int64_t item, int64_t head) {
    if (head % group_heads == 0) gradients.BeginGroup(rows, item, head / group_heads);
    gradients.Run(chunk, head);
    if ((head + 1) % group_heads == 0) gradients.EndGroup();
  });
  gradients.AddSkipGradients();
  return absl::OkStatus();
}

template absl::Status SsdBackwardChunkStates<float>(CpuTag, Context&, const Ssd&, const SsdBackwardStates&,
                                                    const SegmentSummary&);
template absl::Status SsdBackwardChunkStates<double>(CpuTag, Context&, const Ssd&, const SsdBackwardStates&,
                                                     const SegmentSummary&);
template absl::Status SsdBackward<float>(CpuTag, Context&, const Ssd&, const SsdBackwardStates&,
                                         ConstTensorRef, const SsdGradients&);
template absl::Status SsdBackward<double>(CpuTag, Context&, const Ssd&, const SsdBackwardStates&,
                                          ConstTensorRef, const SsdGradients&);

}  // namespace annulus::kernels
