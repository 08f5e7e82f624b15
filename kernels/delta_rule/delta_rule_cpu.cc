// Forward of the gated delta rule, chunk after chunk (delta_chunk_cpu.h).

#include "kernels/delta_rule/delta_chunk_cpu.h"

namespace annulus::kernels {

template <typename T>
absl::Status DeltaSummary(CpuTag, Context& ctx, const DeltaRule& rule, const SegmentSummary& summary) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  ArenaScope scope(ctx.scratch);
  DeltaChunk<T> chunk(ctx, rule);
  const StridedRows<T> writes = RowsScratch<T>(ctx, DeltaLongestChunk(rule), std::max(k, v));
  const std::vector<SegmentChunk> all = ChunksOf(rule.segments, rule.chunk);
  const auto run = [&](int64_t segment, int64_t head, const std::vector<int64_t>& chunks) {
    T* transition = summary.transition.data<T>() + (segment * heads + head) * k * k;
    T* state = summary.state.data<T>() + (segment * heads + head) * k * v;
    SetIdentity(k, transition);
    std::fill_n(state, k * v, T{0});
    for (const int64_t c : chunks) {
      chunk.Set(all[static_cast<size_t>(c)].rows, head);
      chunk.Residual(chunk.v, state, v, writes);
      chunk.Solve(v, writes);
      chunk.Advance(writes, v, state);
      chunk.AdvanceTransition(writes, transition);
      ctx.Poll();
    }
  };
  ForEachSegmentHead(ctx, DeltaWalk(rule, ChunkOrder::kFromFirst), run);
  return absl::OkStatus();
}

template <typename T>
absl::Status DeltaForward(CpuTag, Context& ctx, const DeltaRule& rule, ConstTensorRef initial,
                          TensorRef states, HeadsRef o) {
  const int64_t k = rule.k.dim, v = rule.v.dim, heads = rule.k.batch * rule.k.heads;
  const int64_t longest = DeltaLongestChunk(rule);
  ArenaScope scope(ctx.scratch);
  DeltaChunk<T> chunk(ctx, rule);
  const StridedRows<T> writes = RowsScratch<T>(ctx, longest, v), queries = RowsScratch<T>(ctx, longest, k);
  const StridedRows<T> weights = RowsScratch<T>(ctx, longest, longest);
  T* state = ScratchElements<T>(ctx, k * v);
  const std::vector<SegmentChunk> all = ChunksOf(rule.segments, rule.chunk);
  const auto run = [&](int64_t segment, int64_t head, const std::vector<int64_t>& chunks) {
    SetState(initial, segment * heads + head, k * v, state);
    for (const int64_t c : chunks) {
      const RowRange rows = all[static_cast<size_t>(c)].rows;
      std::copy_n(state, k * v, states.data<T>() + (c * heads + head) * k * v);
      chunk.Set(rows, head);
      chunk.Residual(chunk.v, state, v, writes);
      chunk.Solve(v, writes);
      ScaleRows<T>(rows.size(), k, [&](int64_t t) { return chunk.decay().FromBefore(t); }, chunk.q, queries);
      const auto out = HeadRows<T>(o, rows.begin, head / rule.k.heads, head % rule.k.heads);
      Multiply<T>({.m = rows.size(), .n = v, .k = k}, queries, {state, v}, {}, out);
      chunk.QueryWeights(weights);
      LowerTimes<T>({.n = rows.size(), .columns = v}, weights, writes, Write::kAccumulate, out);
      chunk.Advance(writes, v, state);
      ctx.Poll();
    }
  };
  ForEachSegmentHead(ctx, DeltaWalk(rule, ChunkOrder::kFromFirst), run);
  return absl::OkStatus();
}

template absl::Status DeltaSummary<float>(CpuTag, Context&, const DeltaRule&, const SegmentSummary&);
template absl::Status DeltaSummary<double>(CpuTag, Context&, const DeltaRule&, const SegmentSummary&);
template absl::Status DeltaForward<float>(CpuTag, Context&, const DeltaRule&, ConstTensorRef, TensorRef,
                                          HeadsRef);
template absl::Status DeltaForward<double>(CpuTag, Context&, const DeltaRule&, ConstTensorRef, TensorRef,
                                           HeadsRef);

}  // namespace annulus::kernels
