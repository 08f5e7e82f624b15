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
T Dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
class Gradients {
 public:
  Gradients(Context& ctx, const Ssd& ssd, const SsdBackwardStates& in, const SsdGradients& out)
      : ssd_(ssd), in_(in), out_(out), decay_(ctx, ssd), stride_(SsdLongestChunk(ssd)) {
    const int64_t width = std::max(ssd.x.dim, ssd.b.dim);
    products_ = SsdScratch<T>(ctx, stride_ * stride_);
    dproducts_ = SsdScratch<T>(ctx, stride_ * stride_);
    weights_ = SsdScratch<T>(ctx, stride_ * stride_);
    scaled_ = SsdScratch<T>(ctx, stride_ * ssd.x.dim);
    through_state_ = SsdScratch<T>(ctx, stride_ * width);
    decays_ = SsdScratch<T>(ctx, stride_);
    dt_ = SsdScratch<T>(ctx, stride_);
    dsum_ = SsdScratch<double>(ctx, stride_);
    ddt_ = SsdScratch<double>(ctx, stride_);
    dskip_ = SsdScratch<double>(ctx, ssd.x.heads);
    std::fill_n(dskip_, ssd.x.heads, 0.0);
  }

  void BeginGroup(const RowRange& rows, int64_t item, int64_t group) {
    rows_ = rows;
    n_ = rows.size();
    item_ = item;
    group_ = group;
    decay_.SetRows(rows, item);
    LowerProduct<T>(n_, ssd_.b.dim, Of(ssd_.c, group), Of(ssd_.b, group), {products_, stride_});
    std::fill_n(dproducts_, n_ * stride_, T{0});
    for (int64_t r = 0; r < n_; ++r) {
      std::fill_n(ChunkHead<T>(out_.db, rows_, item_, group_, r), ssd_.b.dim, T{0});
      std::fill_n(ChunkHead<T>(out_.dc, rows_, item_, group_, r), ssd_.c.dim, T{0});
    }
  }

  void Run(int64_t chunk, int64_t head) {
    decay_.SetHead(head);
    head_ = head;
    for (int64_t r = 0; r < n_; ++r) dt_[r] = decay_.Dt(r);
    std::fill_n(dsum_, n_, 0.0);
    std::fill_n(ddt_, n_, 0.0);
    const int64_t index = item_ * ssd_.x.heads + head, heads = ssd_.x.batch * ssd_.x.heads;
    const int64_t offset = (chunk * heads + index) * ssd_.b.dim * ssd_.x.dim;
    Inside();
    ThroughEnd(in_.gradients.data<T>() + offset);
    ThroughStart(in_.states.states.template data<T>() + offset);
    ThroughChunk(in_.states.states.template data<T>() + offset, in_.gradients.data<T>() + offset);
    if (ssd_.skip.defined()) Skip();
    Store();
  }

  void EndGroup() {
    const Rows<const T> dproducts{dproducts_, stride_};
    LowerTransposedTimes<T>(n_, ssd_.b.dim, dproducts, Of(ssd_.c, group_), Write::kAccumulate,
                            Of(out_.db, group_));
    LowerTimes<T>(n_, ssd_.c.dim, dproducts, Of(ssd_.b, group_), Write::kAccumulate, Of(out_.dc, group_));
  }

  void AddSkipGradients() {
    if (!ssd_.skip.defined()) return;
    T* dskip = out_.dskip.template data<T>();
    for (int64_t h = 0; h < ssd_.x.heads; ++h) dskip[h] += static_cast<T>(dskip_[h]);
  }

 private:
  template <typename Byte>
  auto Of(const BasicHeadsRef<Byte>& x, int64_t head, int64_t first = 0) const {
    auto* data = ChunkHead<T>(x, rows_, item_, head, first);
    return Rows<std::remove_pointer_t<decltype(data)>>{data, RowStride(x)};
  }

  void Inside() {
    LowerProduct<T>(n_, ssd_.x.dim, Of(in_.dy, head_), Of(ssd_.x, head_), {weights_, stride_});
    ForEachPanel(n_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) InsideRow(t, end);
    });
    LowerTransposedTimes<T>(n_, ssd_.x.dim, {weights_, stride_}, Of(in_.dy, head_), Write::kOverwrite,
                            Of(out_.dx, head_));
  }

  // Row t of the weights: from dy x to M, of which the product reads columns [0, end).
  void InsideRow(int64_t t, int64_t end) {
    const int64_t start = decay_.start(t);
    const T* products = products_ + t * stride_;
    T* dproducts = dproducts_ + t * stride_;
    T* weights = weights_ + t * stride_;
    decay_.To(t, decays_);
    double dsum = 0;
#pragma omp simd reduction(+ : dsum)
    for (int64_t s = start; s <= t; ++s) {
      const T decay = decays_[s], dt = dt_[s];
      const double without_dt = static_cast<double>(weights[s] * decay * products[s]);
      dproducts[s] += weights[s] * decay * dt;
      weights[s] = products[s] * decay * dt;
      ddt_[s] += without_dt;
      dsum += without_dt * dt;
      dsum_[s] -= without_dt * dt;
    }
    dsum_[t] += dsum;
    std::fill_n(weights, start, T{0});
    std::fill(weights + t + 1, weights + end, T{0});
  }

  // What the rows of the last document give to the end state.
  void ThroughEnd(const T* gradient) {
    const int64_t last = decay_.last(), p = ssd_.x.dim, n = ssd_.b.dim;
    Gemm<T>({.m = n_ - last,
             .n = p,
             .k = n,
             .a = {ChunkHead<T>(ssd_.b, rows_, item_, group_, last), RowStride(ssd_.b)},
             .b = {gradient, p},
             .beta = 0,
             .c = through_state_,
             .c_stride = p});
    for (int64_t r = last; r < n_; ++r) {
      const T decay = decay_.ToEnd(r), factor = decay * decay_.Dt(r);
      const T* through = through_state_ + (r - last) * p;
      const T* x = ChunkHead<T>(ssd_.x, rows_, item_, head_, r);
      T* dx = ChunkHead<T>(out_.dx, rows_, item_, head_, r);
      T* scaled = scaled_ + (r - last) * p;
#pragma omp simd
      for (int64_t i = 0; i < p; ++i) {
        dx[i] += factor * through[i];
        scaled[i] = factor * x[i];
      }
      const double without_dt = decay * Dot(x, through, p);
      ddt_[r] += without_dt;
      dsum_[r] -= without_dt * decay_.Dt(r);
      dsum_[n_ - 1] += without_dt * decay_.Dt(r);
    }
    Gemm<T>({.m = n_ - last,
             .n = n,
             .k = p,
             .a = {scaled_, p},
             .b = {gradient, p, Transpose::kYes},
             .beta = 1,
             .c = ChunkHead<T>(out_.db, rows_, item_, group_, last),
             .c_stride = RowStride(out_.db)});
  }

  // What the rows of the first document got from the start state.
  void ThroughStart(const T* state) {
    const int64_t carried = decay_.carried(), p = ssd_.x.dim, n = ssd_.c.dim;
    for (int64_t r = 0; r < carried; ++r) {
      const T decay = decay_.FromBefore(r);
      const T* dy = ChunkHead<T>(in_.dy, rows_, item_, head_, r);
#pragma omp simd
      for (int64_t i = 0; i < p; ++i) scaled_[r * p + i] = decay * dy[i];
    }
    Gemm<T>({.m = carried,
             .n = n,
             .k = p,
             .a = {scaled_, p},
             .b = {state, p, Transpose::kYes},
             .beta = 0,
             .c = through_state_,
             .c_stride = n});
    for (int64_t r = 0; r < carried; ++r) {
      const T* through = through_state_ + r * n;
      T* dc = ChunkHead<T>(out_.dc, rows_, item_, group_, r);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) dc[i] += through[i];
      dsum_[r] += Dot(ChunkHead<T>(ssd_.c, rows_, item_, group_, r), through, n);
    }
  }

  // From the start state to the end state, where no document starts.
  void ThroughChunk(const T* state, const T* gradient) {
    if (decay_.carried() < n_) return;
    dsum_[n_ - 1] += decay_.FromBefore(n_ - 1) * Dot(state, gradient, ssd_.b.dim * ssd_.x.dim);
  }

  void Skip() {
    const T skip = ssd_.skip.template data<T>()[head_];
    for (int64_t r = 0; r < n_; ++r) {
      const T* x = ChunkHead<T>(ssd_.x, rows_, item_, head_, r);
      const T* dy = ChunkHead<T>(in_.dy, rows_, item_, head_, r);
      T* dx = ChunkHead<T>(out_.dx, rows_, item_, head_, r);
#pragma omp simd
      for (int64_t i = 0; i < ssd_.x.dim; ++i) dx[i] += skip * dy[i];
      dskip_[head_] += Dot(x, dy, ssd_.x.dim);
    }
  }

  void Store() {
    T* da = out_.da.template data<T>();
    double later = 0;
    for (int64_t r = n_ - 1; r >= 0; --r) {
      later += dsum_[r];
      const bool starts = decay_.StartsDocument(r);
      da[decay_.Gate(r)] = starts ? T{0} : static_cast<T>(later);
      if (starts) later = 0;
    }
    if (!ssd_.dt.defined()) return;
    T* ddt = out_.ddt.template data<T>();
    for (int64_t r = 0; r < n_; ++r) ddt[decay_.Gate(r)] = static_cast<T>(ddt_[r]);
  }

  const Ssd& ssd_;
  const SsdBackwardStates& in_;
  const SsdGradients& out_;
  ChunkDecay<T> decay_;
  const int64_t stride_;
  T* products_;       // [rows, rows] of c and b, lower half
  T* dproducts_;      // [rows, rows], over the heads of a group
  T* weights_;        // [rows, rows] products of dy and x, then M
  T* scaled_;         // [rows, head_dim]
  T* through_state_;  // [rows, head_dim or state]
  T* decays_;         // [rows]: to one row
  T* dt_;             // [rows]
  double* dsum_;      // [rows]
  double* ddt_;       // [rows]
  double* dskip_;     // [heads]
  RowRange rows_;
  int64_t n_ = 0, item_ = 0, group_ = 0, head_ = 0;
};

// Chunk after chunk from the last: gradients of start states from the chunk's own y become those of end
// states.
template <typename T>
void ScanGradients(const SsdBackwardStates& in, int64_t first, int64_t last, int64_t heads, int64_t index,
                   int64_t n, T* gradient) {
  for (int64_t c = last - 1; c >= first; --c) {
    const T alpha = Exp(in.states.decays.data<T>()[c * heads + index]);
    T* of_chunk = in.gradients.data<T>() + (c * heads + index) * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T at_end = gradient[i];
      gradient[i] = alpha * at_end + of_chunk[i];
      of_chunk[i] = at_end;
    }
  }
}

}  // namespace

template <typename T>
absl::Status SsdBackwardChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, p = ssd.x.dim, n = ssd.b.dim;
  ArenaScope scope(ctx.scratch);
  ChunkDecay<T> decay(ctx, ssd);
  T* outputs = SsdScratch<T>(ctx, SsdLongestChunk(ssd) * p);
  const std::vector<SegmentChunk> chunks = ChunksOf(ssd.segments, ssd.chunk);
  for (size_t c = 0; c < chunks.size(); ++c) {
    const RowRange& rows = chunks[c].rows;
    for (int64_t index = 0; index < heads; ++index) {
      const int64_t item = index / ssd.x.heads, head = index % ssd.x.heads;
      const int64_t group = head / (ssd.x.heads / ssd.b.heads);
      if (head == 0) decay.SetRows(rows, item);
      decay.SetHead(head);
      for (int64_t r = 0; r < decay.carried(); ++r) {
        const T factor = decay.FromBefore(r);
        const T* dy = ChunkHead<T>(in.dy, rows, item, head, r);
#pragma omp simd
        for (int64_t i = 0; i < p; ++i) outputs[r * p + i] = factor * dy[i];
      }
      Gemm<T>({.m = n,
               .n = p,
               .k = decay.carried(),
               .a = {ChunkHead<T>(ssd.c, rows, item, group), RowStride(ssd.c), Transpose::kYes},
               .b = {outputs, p},
               .beta = 0,
               .c = in.gradients.data<T>() + (static_cast<int64_t>(c) * heads + index) * n * p,
               .c_stride = p});
      ctx.Poll();
    }
  }
  ForEachSegment(ssd.segments, ssd.chunk, [&](int64_t segment, int64_t first, int64_t last) {
    for (int64_t index = 0; index < heads; ++index) {
      T transition = 1;
      T* gradient = summary.state.data<T>() + (segment * heads + index) * n * p;
      std::fill_n(gradient, n * p, T{0});
      for (int64_t c = last - 1; c >= first; --c) {
        const T alpha = Exp(in.states.decays.data<T>()[c * heads + index]);
        const T* of_chunk = in.gradients.data<T>() + (c * heads + index) * n * p;
        transition *= alpha;
#pragma omp simd
        for (int64_t i = 0; i < n * p; ++i) gradient[i] = alpha * gradient[i] + of_chunk[i];
      }
      summary.transition.data<T>()[segment * heads + index] = transition;
      ctx.Poll();
    }
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status SsdBackward(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         ConstTensorRef final_gradient, const SsdGradients& out) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, size = ssd.b.dim * ssd.x.dim;
  ArenaScope scope(ctx.scratch);
  T* gradient = SsdScratch<T>(ctx, size);
  ForEachSegment(ssd.segments, ssd.chunk, [&](int64_t segment, int64_t first, int64_t last) {
    for (int64_t index = 0; index < heads; ++index) {
      if (final_gradient.defined()) {
        std::copy_n(final_gradient.data<T>() + (segment * heads + index) * size, size, gradient);
      } else {
        std::fill_n(gradient, size, T{0});
      }
      ScanGradients(in, first, last, heads, index, size, gradient);
      ctx.Poll();
    }
  });
  Gradients<T> gradients(ctx, ssd, in, out);
  const std::vector<SegmentChunk> chunks = ChunksOf(ssd.segments, ssd.chunk);
  const int64_t group_heads = ssd.x.heads / ssd.b.heads;
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (int64_t item = 0; item < ssd.x.batch; ++item) {
      for (int64_t head = 0; head < ssd.x.heads; ++head) {
        if (head % group_heads == 0) gradients.BeginGroup(chunks[c].rows, item, head / group_heads);
        gradients.Run(static_cast<int64_t>(c), head);
        if ((head + 1) % group_heads == 0) gradients.EndGroup();
        ctx.Poll();
      }
    }
  }
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
