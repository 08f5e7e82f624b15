// Forward of the scan in chunks (Dao and Gu, 2024, section 6), with W the decays between rows of a chunk and
// w those to its end:
//
//   end state of a chunk   B^T (w dt X)
//   y                      ((C B^T) o W dt) X + (decay from before) C h_in + skip X

#include "kernels/ssd/ssd_chunk_cpu.h"

namespace annulus::kernels {
namespace {

template <typename T>
class Outputs {
 public:
  Outputs(Context& ctx, const Ssd& ssd, const SsdStates& states, const HeadsRef& y)
      : ssd_(ssd), states_(states), y_(y), decay_(ctx, ssd.a, ssd.ages, SsdLongestChunk(ssd)) {
    const int64_t longest = SsdLongestChunk(ssd);
    products_ = RowsScratch<T>(ctx, longest, longest);
    weights_ = RowsScratch<T>(ctx, longest, longest);
    queries_ = RowsScratch<T>(ctx, longest, ssd.c.dim);
    steps_ = ScratchElements<T>(ctx, longest);
  }

  void SetGroup(const RowRange& rows, int64_t item, int64_t group) {
    rows_ = rows;
    item_ = item;
    group_ = group;
    decay_.SetRows(rows, item);
    LowerProduct<T>(rows.size(), ssd_.b.dim, HeadRows<T>(ssd_.c, rows.begin, item, group),
                    HeadRows<T>(ssd_.b, rows.begin, item, group), products_);
  }

  void Run(int64_t chunk, int64_t head) {
    decay_.SetHead(head);
    for (int64_t r = 0; r < rows_.size(); ++r) steps_[r] = SsdStep<T>(ssd_, decay_.Gate(r));
    ForEachPanel(rows_.size(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) Weigh(t, end);
    });
    const auto x = HeadRows<T>(ssd_.x, rows_.begin, item_, head);
    const auto y = HeadRows<T>(y_, rows_.begin, item_, head);
    LowerTimes<T>({.n = rows_.size(), .columns = ssd_.x.dim}, weights_, x, Write::kOverwrite, y);
    const int64_t index = chunk * ssd_.x.batch * ssd_.x.heads + item_ * ssd_.x.heads + head;
    AddCarried(states_.states.data<T>() + index * ssd_.b.dim * ssd_.x.dim, y);
    if (!ssd_.skip.defined()) return;
    const T skip = ssd_.skip.data<T>()[head];
    AddScaledRows<T>(rows_.size(), ssd_.x.dim, [&](int64_t) { return skip; }, x, y);
  }

 private:
  // Row t of the weights, of which the product reads columns [0, end).
  void Weigh(int64_t t, int64_t end) {
    const T* products = products_.at(t);
    T* weights = weights_.at(t);
    std::fill_n(weights, decay_.start(t), T{0});
    decay_.To(t, weights);
#pragma omp simd
    for (int64_t s = decay_.start(t); s <= t; ++s) weights[s] *= products[s] * steps_[s];
    std::fill(weights + t + 1, weights + end, T{0});
  }

  void AddCarried(const T* state, const StridedRows<T>& y) {
    ScaleRows<T>(
        decay_.carried(), ssd_.c.dim, [&](int64_t t) { return decay_.FromBefore(t); },
        HeadRows<T>(ssd_.c, rows_.begin, item_, group_), queries_);
    Multiply<T>({.m = decay_.carried(), .n = ssd_.x.dim, .k = ssd_.c.dim}, queries_, {state, ssd_.x.dim},
                {.write = Write::kAccumulate}, y);
  }

  const Ssd& ssd_;
  const SsdStates& states_;
  const HeadsRef& y_;
  ChunkDecay<T> decay_;
  StridedRows<T> products_;  // [rows, rows] of c and b, lower half
  StridedRows<T> weights_;   // [rows, rows], of x in y
  StridedRows<T> queries_;   // [rows, state]: decayed c
  T* steps_;                 // [rows]: dt
  RowRange rows_;
  int64_t item_ = 0, group_ = 0;
};

}  // namespace

template <typename T>
absl::Status SsdChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, p = ssd.x.dim, n = ssd.b.dim;
  ArenaScope scope(ctx.scratch);
  ChunkDecay<T> decay(ctx, ssd.a, ssd.ages, SsdLongestChunk(ssd));
  const StridedRows<T> inputs = RowsScratch<T>(ctx, SsdLongestChunk(ssd), p);
  ForEachChunkHead(ctx, ssd, [&](int64_t chunk, const RowRange& rows, int64_t item, int64_t head) {
    const int64_t out = chunk * heads + item * ssd.x.heads + head;
    if (head == 0) decay.SetRows(rows, item);
    decay.SetHead(head);
    const int64_t last = decay.last(), count = rows.size() - last;
    ScaleRows<T>(
        count, p, [&](int64_t r) { return decay.ToEnd(last + r) * SsdStep<T>(ssd, decay.Gate(last + r)); },
        HeadRows<T>(ssd.x, rows.begin + last, item, head), inputs);
    Multiply<T>({.m = n, .n = p, .k = count},
                HeadRows<T>(ssd.b, rows.begin + last, item, SsdGroup(ssd, head)), inputs,
                {.a = Transpose::kYes}, {states.states.data<T>() + out * n * p, p});
    states.decays.data<T>()[out] = decay.Log();
  });
  SummariseChunks<T>(ctx, ssd, ChunkOrder::kFromFirst, states, summary);
  return absl::OkStatus();
}

template <typename T>
absl::Status SsdForward(CpuTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial, const SsdStates& states,
                        HeadsRef y) {
  ChainChunks<T>(ctx, ssd, ChunkOrder::kFromFirst, initial, states);
  ArenaScope scope(ctx.scratch);
  Outputs<T> outputs(ctx, ssd, states, y);
  ForEachChunkHead(ctx, ssd, [&](int64_t chunk, const RowRange& rows, int64_t item, int64_t head) {
    if (head % (ssd.x.heads / ssd.b.heads) == 0) outputs.SetGroup(rows, item, SsdGroup(ssd, head));
    outputs.Run(chunk, head);
  });
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
