// Forward of the scan in chunks (Dao and Gu, 2024, section 6), with W the decays between rows of a chunk and
// w those to its end:
//
//   end state of a chunk   B^T (w dt X)
//   y                      ((C B^T) o W dt) X + (decay from before) C h_in + skip X

#include "kernels/ssd/ssd_chunk_cpu.h"

namespace annulus::kernels {
namespace {

template <typename T>
void Scale(T factor, const T* x, int64_t n, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}

// states[n] of chunk after chunk: what was the end state of each from nothing becomes the state at its start.
template <typename T>
void ScanStates(const SsdStates& states, int64_t first, int64_t last, int64_t heads, int64_t index, int64_t n,
                T* state) {
  for (int64_t c = first; c < last; ++c) {
    const T alpha = Exp(states.decays.data<T>()[c * heads + index]);
    T* of_chunk = states.states.data<T>() + (c * heads + index) * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T before = state[i];
      state[i] = alpha * before + of_chunk[i];
      of_chunk[i] = before;
    }
  }
}

template <typename T>
class Outputs {
 public:
  Outputs(Context& ctx, const Ssd& ssd, const SsdStates& states, const HeadsRef& y)
      : ssd_(ssd), states_(states), y_(y), decay_(ctx, ssd), stride_(SsdLongestChunk(ssd)) {
    products_ = SsdScratch<T>(ctx, stride_ * stride_);
    weights_ = SsdScratch<T>(ctx, stride_ * stride_);
    queries_ = SsdScratch<T>(ctx, stride_ * ssd.c.dim);
    dt_ = SsdScratch<T>(ctx, stride_);
  }

  void SetGroup(const RowRange& rows, int64_t item, int64_t group) {
    rows_ = rows;
    item_ = item;
    group_ = group;
    decay_.SetRows(rows, item);
    LowerProduct<T>(rows.size(), ssd_.b.dim, {ChunkHead<T>(ssd_.c, rows, item, group), RowStride(ssd_.c)},
                    {ChunkHead<T>(ssd_.b, rows, item, group), RowStride(ssd_.b)}, {products_, stride_});
  }

  void Run(int64_t chunk, int64_t head) {
    decay_.SetHead(head);
    for (int64_t r = 0; r < rows_.size(); ++r) dt_[r] = decay_.Dt(r);
    ForEachPanel(rows_.size(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) Weigh(t, end);
    });
    const T* x = ChunkHead<T>(ssd_.x, rows_, item_, head);
    T* y = ChunkHead<T>(y_, rows_, item_, head);
    LowerTimes<T>(rows_.size(), ssd_.x.dim, {weights_, stride_}, {x, RowStride(ssd_.x)}, Write::kOverwrite,
                  {y, RowStride(y_)});
    const int64_t index = item_ * ssd_.x.heads + head, heads = ssd_.x.batch * ssd_.x.heads;
    AddCarried(states_.states.data<T>() + (chunk * heads + index) * ssd_.b.dim * ssd_.x.dim, y);
    if (ssd_.skip.defined()) AddSkip(ssd_.skip.data<T>()[head], x, y);
  }

 private:
  // Row t of the weights, of which the product reads columns [0, end).
  void Weigh(int64_t t, int64_t end) {
    const T* products = products_ + t * stride_;
    T* weights = weights_ + t * stride_;
    std::fill_n(weights, decay_.start(t), T{0});
    decay_.To(t, weights);
#pragma omp simd
    for (int64_t s = decay_.start(t); s <= t; ++s) weights[s] *= products[s] * dt_[s];
    std::fill(weights + t + 1, weights + end, T{0});
  }

  void AddCarried(const T* state, T* y) {
    const int64_t n = ssd_.c.dim;
    for (int64_t t = 0; t < decay_.carried(); ++t) {
      Scale(decay_.FromBefore(t), ChunkHead<T>(ssd_.c, rows_, item_, group_, t), n, queries_ + t * n);
    }
    Gemm<T>({.m = decay_.carried(),
             .n = ssd_.x.dim,
             .k = n,
             .a = {queries_, n},
             .b = {state, ssd_.x.dim},
             .beta = 1,
             .c = y,
             .c_stride = RowStride(y_)});
  }

  void AddSkip(T skip, const T* x, T* y) {
    for (int64_t t = 0; t < rows_.size(); ++t) {
      const T* in = x + t * ssd_.x.row_stride;
      T* out = y + t * y_.row_stride;
#pragma omp simd
      for (int64_t i = 0; i < ssd_.x.dim; ++i) out[i] += skip * in[i];
    }
  }

  const Ssd& ssd_;
  const SsdStates& states_;
  const HeadsRef& y_;
  ChunkDecay<T> decay_;
  const int64_t stride_;
  T* products_;  // [rows, rows] of c and b, lower half
  T* weights_;   // [rows, rows], of x in y
  T* queries_;   // [rows, state]: decayed c
  T* dt_;        // [rows]
  RowRange rows_;
  int64_t item_ = 0, group_ = 0;
};

}  // namespace

template <typename T>
absl::Status SsdChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, p = ssd.x.dim, n = ssd.b.dim;
  ArenaScope scope(ctx.scratch);
  ChunkDecay<T> decay(ctx, ssd);
  T* inputs = SsdScratch<T>(ctx, SsdLongestChunk(ssd) * p);
  const std::vector<SegmentChunk> chunks = ChunksOf(ssd.segments, ssd.chunk);
  for (size_t c = 0; c < chunks.size(); ++c) {
    const RowRange& rows = chunks[c].rows;
    for (int64_t index = 0; index < heads; ++index) {
      const int64_t item = index / ssd.x.heads, head = index % ssd.x.heads;
      const int64_t group = head / (ssd.x.heads / ssd.b.heads);
      const int64_t out = static_cast<int64_t>(c) * heads + index;
      if (head == 0) decay.SetRows(rows, item);
      decay.SetHead(head);
      const int64_t last = decay.last();
      for (int64_t r = last; r < rows.size(); ++r) {
        Scale(decay.ToEnd(r) * decay.Dt(r), ChunkHead<T>(ssd.x, rows, item, head, r), p,
              inputs + (r - last) * p);
      }
      Gemm<T>({.m = n,
               .n = p,
               .k = rows.size() - last,
               .a = {ChunkHead<T>(ssd.b, rows, item, group, last), RowStride(ssd.b), Transpose::kYes},
               .b = {inputs, p},
               .beta = 0,
               .c = states.states.data<T>() + out * n * p,
               .c_stride = p});
      states.decays.data<T>()[out] = decay.Log();
      ctx.Poll();
    }
  }
  ForEachSegment(ssd.segments, ssd.chunk, [&](int64_t segment, int64_t first, int64_t last) {
    for (int64_t index = 0; index < heads; ++index) {
      T transition = 1;
      T* state = summary.state.data<T>() + (segment * heads + index) * n * p;
      std::fill_n(state, n * p, T{0});
      for (int64_t c = first; c < last; ++c) {
        const T alpha = Exp(states.decays.data<T>()[c * heads + index]);
        const T* of_chunk = states.states.data<T>() + (c * heads + index) * n * p;
        transition *= alpha;
#pragma omp simd
        for (int64_t i = 0; i < n * p; ++i) state[i] = alpha * state[i] + of_chunk[i];
      }
      summary.transition.data<T>()[segment * heads + index] = transition;
      ctx.Poll();
    }
  });
  return absl::OkStatus();
}

template <typename T>
absl::Status SsdForward(CpuTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial, const SsdStates& states,
                        HeadsRef y) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, size = ssd.b.dim * ssd.x.dim;
  ArenaScope scope(ctx.scratch);
  T* state = SsdScratch<T>(ctx, size);
  ForEachSegment(ssd.segments, ssd.chunk, [&](int64_t segment, int64_t first, int64_t last) {
    for (int64_t index = 0; index < heads; ++index) {
      if (initial.defined()) {
        std::copy_n(initial.data<T>() + (segment * heads + index) * size, size, state);
      } else {
        std::fill_n(state, size, T{0});
      }
      ScanStates(states, first, last, heads, index, size, state);
      ctx.Poll();
    }
  });
  Outputs<T> outputs(ctx, ssd, states, y);
  const std::vector<SegmentChunk> chunks = ChunksOf(ssd.segments, ssd.chunk);
  const int64_t group_heads = ssd.x.heads / ssd.b.heads;
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (int64_t item = 0; item < ssd.x.batch; ++item) {
      for (int64_t head = 0; head < ssd.x.heads; ++head) {
        if (head % group_heads == 0) outputs.SetGroup(chunks[c].rows, item, head / group_heads);
        outputs.Run(static_cast<int64_t>(c), head);
        ctx.Poll();
      }
    }
  }
  return absl::OkStatus();
}

template absl::Status SsdChunkStates<float>(CpuTag, Context&, const Ssd&, const SsdStates&,
                                            const SegmentSummary&);
template absl::Status SsdChunkStates<double>(CpuTag, Context&, const Ssd&, const SsdStates&,
                                             const SegmentSummary&);
template absl::Status SsdForward<float>(CpuTag, Context&, const Ssd&, ConstTensorRef, const SsdStates&,
                                        HeadsRef);
template absl::Status SsdForward<double>(CpuTag, Context&, const Ssd&, ConstTensorRef, const SsdStates&,
                                         HeadsRef);

}  // namespace annulus::kernels
