#pragma once

// What the CPU kernels of annulus/ops/ssd.h share.

#include "kernels/common/chunk_decay_cpu.h"
#include "kernels/common/rows_cpu.h"
#include "kernels/common/segments.h"
#include "kernels/ssd/ssd_kernels.h"

namespace annulus::kernels {

// Rows of the longest chunk.
inline int64_t SsdLongestChunk(const Ssd& ssd) { return std::min(ssd.chunk, ssd.x.rows); }

// Index of the group that a head reads.
inline int64_t SsdGroup(const Ssd& ssd, int64_t head) { return head / (ssd.x.heads / ssd.b.heads); }

template <typename T>
T SsdStep(const Ssd& ssd, int64_t gate) {
  return ssd.dt.defined() ? ssd.dt.data<T>()[gate] : T{1};
}

// Calls fn(chunk, rows, item, head) for all, heads of an item one after the other; polls after each.
template <typename Fn>
void ForEachChunkHead(const Context& ctx, const Ssd& ssd, Fn&& fn) {
  const std::vector<SegmentChunk> chunks = ChunksOf(ssd.segments, ssd.chunk);
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (int64_t item = 0; item < ssd.x.batch; ++item) {
      for (int64_t head = 0; head < ssd.x.heads; ++head) {
        fn(static_cast<int64_t>(c), chunks[c].rows, item, head);
        ctx.Poll();
      }
    }
  }
}

inline ChunkWalk SsdWalk(const Ssd& ssd, ChunkOrder order) {
  return {.segments = ssd.segments, .chunk = ssd.chunk, .heads = ssd.x.batch * ssd.x.heads, .order = order};
}

// What a segment does to a state that reaches its first chunk in `order`: state <- decay state + own, chunk
// after chunk.   decays: [chunks, batch * heads], logarithms   own: [chunks, batch * heads, state, head_dim]
template <typename T>
void SummariseChunks(const Context& ctx, const Ssd& ssd, ChunkOrder order, const SsdStates& own,
                     const SegmentSummary& summary) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, size = ssd.b.dim * ssd.x.dim;
  ForEachSegmentHead(ctx, SsdWalk(ssd, order), [&](int64_t segment, int64_t index, const auto& chunks) {
    T transition = 1;
    T* state = summary.state.data<T>() + (segment * heads + index) * size;
    std::fill_n(state, size, T{0});
    for (const int64_t chunk : chunks) {
      const T decay = Exp(own.decays.data<T>()[chunk * heads + index]);
      const T* added = own.states.data<T>() + (chunk * heads + index) * size;
      transition *= decay;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) state[i] = decay * state[i] + added[i];
    }
    summary.transition.data<T>()[segment * heads + index] = transition;
  });
}

// From the state that reaches each segment (undefined: zero), in place of `own` the state that reaches each
// chunk.
template <typename T>
void ChainChunks(Context& ctx, const Ssd& ssd, ChunkOrder order, const ConstTensorRef& incoming,
                 const SsdStates& own) {
  const int64_t heads = ssd.x.batch * ssd.x.heads, size = ssd.b.dim * ssd.x.dim;
  ArenaScope scope(ctx.scratch);
  T* state = ScratchElements<T>(ctx, size);
  ForEachSegmentHead(ctx, SsdWalk(ssd, order), [&](int64_t segment, int64_t index, const auto& chunks) {
    SetState(incoming, segment * heads + index, size, state);
    for (const int64_t chunk : chunks) {
      const T decay = Exp(own.decays.data<T>()[chunk * heads + index]);
      T* of_chunk = own.states.data<T>() + (chunk * heads + index) * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const T before = state[i];
        state[i] = decay * before + of_chunk[i];
        of_chunk[i] = before;
      }
    }
  });
}

}  // namespace annulus::kernels
