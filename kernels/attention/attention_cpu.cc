// Forward of block attention: per query tile an online softmax over key tiles (Milakov and Gimelshein, 2018)
// that starts from the carry. A previous partial (O, LSE) is the state (acc, m, l) = (O, LSE, 1): its sum of
// exp(s - LSE) is one by the definition of LSE.

#include <cmath>

#include "kernels/attention/attention_kernels.h"
#include "kernels/attention/attention_tile_cpu.h"
#include "kernels/common/vector_math.h"

namespace annulus::kernels {
namespace {

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

template <typename T>
class ForwardTiles {
 public:
  ForwardTiles(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial)
      : ctx_(ctx), block_(block), partial_(partial), v_dim_(block.v.dim) {
    const int64_t height = MaxTileHeight(block);
    q_ = ScratchOf<T>(ctx, height * block.q.dim);
    scores_ = ScratchOf<T>(ctx, height * kTileKeys);
    acc_ = ScratchOf<T>(ctx, height * v_dim_);
    max_ = ScratchOf<T>(ctx, height);
    sum_ = ScratchOf<T>(ctx, height);
  }

  void Run(const QueryTile& tile, const KeyRange* ranges) {
    Pack(block_.q, tile, static_cast<T>(block_.scale), q_);
    Load(tile);
    ForEachKeyTile(ctx_, tile, [&](const KeyRange& keys) { Step(tile, ranges, keys); });
    Store(tile, ranges);
  }

 private:
  void Load(const QueryTile& tile) {
    const T* lse = partial_.lse.template data<T>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* out = TileRows<T>(partial_.out, tile) + r * partial_.out.row_stride;
      for (int64_t h = 0; h < tile.group; ++h) {
        const int64_t m = r * tile.group + h;
        max_[m] = lse[StatIndex(block_.q, tile, r) + h];
        const bool no_keys_yet = max_[m] == kMinusInfinity<T>;
        sum_[m] = no_keys_yet ? T{0} : T{1};
        if (no_keys_yet) {
          std::fill_n(acc_ + m * v_dim_, v_dim_, T{0});
        } else {
          std::copy_n(out + h * v_dim_, v_dim_, acc_ + m * v_dim_);
        }
      }
    }
  }

  void Step(const QueryTile& tile, const KeyRange* ranges, const KeyRange& keys) {
    MultiplyByKeys(q_, block_.k, tile, keys, scores_);
    for (int64_t m = 0; m < tile.height(); ++m) Weigh(m, Within(ranges[m / tile.group], keys), keys.size());
    Gemm<T>({.m = tile.height(),
             .n = v_dim_,
             .k = keys.size(),
             .a = {scores_, kTileKeys},
             .b = KeyOperand<T>(block_.v, tile, keys.begin),
             .beta = 1,
             .c = acc_,
             .c_stride = v_dim_});
  }

  // Turns the scores of tile row m into weights relative to its maximum so far; zeros outside `allowed`.
  void Weigh(int64_t m, const KeyRange& allowed, int64_t count) {
    T* row = scores_ + m * kTileKeys;
    if (allowed.empty()) {
      std::fill_n(row, count, T{0});
      return;
    }
    T maximum = max_[m];
#pragma omp simd reduction(max : maximum)
    for (int64_t j = allowed.begin; j < allowed.end; ++j) maximum = std::max(maximum, row[j]);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = allowed.begin; j < allowed.end; ++j) {
      row[j] = Exp(row[j] - maximum);
      sum += row[j];
    }
    ZeroOutside(allowed, count, row);
    if (maximum != max_[m]) {
      const T correction = Exp(max_[m] - maximum);
      sum_[m] *= correction;
      T* acc = acc_ + m * v_dim_;
#pragma omp simd
      for (int64_t i = 0; i < v_dim_; ++i) acc[i] *= correction;
      max_[m] = maximum;
    }
    sum_[m] += sum;
  }

  // Rows that saw no key of the block are not written: they keep their bits.
  void Store(const QueryTile& tile, const KeyRange* ranges) {
    T* lse = partial_.lse.template data<T>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (ranges[r].empty()) continue;
      T* out = TileRows<T>(partial_.out, tile) + r * partial_.out.row_stride;
      for (int64_t h = 0; h < tile.group; ++h) {
        const int64_t m = r * tile.group + h;
        const T inverse = T{1} / sum_[m];
        const T* acc = acc_ + m * v_dim_;
        T* to = out + h * v_dim_;
#pragma omp simd
        for (int64_t i = 0; i < v_dim_; ++i) to[i] = acc[i] * inverse;
        lse[StatIndex(block_.q, tile, r) + h] = max_[m] + std::log(sum_[m]);
      }
    }
  }

  Context& ctx_;
  const AttentionBlock& block_;
  const AttentionPartial& partial_;
  const int64_t v_dim_;
  T* q_;       // [height, dim], scaled
  T* scores_;  // [height, kTileKeys], then the weights
  T* acc_;     // [height, v_dim]
  T* max_;     // [height]
  T* sum_;     // [height], of exp(score - max)
};

}  // namespace

absl::Status ResetPartial(CpuTag, Context& ctx, const AttentionPartial& partial) {
  return VisitFloat(partial.out.dtype, [&]<class T>() {
    const HeadsRef& out = partial.out;
    constexpr int64_t kElements = int64_t{1} << 18;  // between polls: tens of microseconds
    const int64_t rows =
        std::max<int64_t>(1, kElements / std::max<int64_t>(1, out.batch * out.heads * out.dim));
    for (int64_t row = 0; row < out.rows; row += rows) {
      if (row > 0) ctx.Poll();
      ZeroHeads<T>(out.Rows(row, std::min(row + rows, out.rows)));
    }
    std::fill_n(partial.lse.data<T>(), partial.lse.elements(), kMinusInfinity<T>);
    return absl::OkStatus();
  });
}

template <typename T>
absl::Status MergePartials(CpuTag, Context& ctx, const PartialMerge& m) {
  for (int64_t row = 0; row < m.out.rows; ++row) {
    for (int64_t item = 0; item < m.out.batch; ++item) {
      for (int64_t head = 0; head < m.out.heads; ++head) {
        const T lse = *(m.lse.At<T>(item, head) + row * m.lse.row_stride);
        T& into_lse = *(m.into_lse.At<T>(item, head) + row * m.into_lse.row_stride);
        const T* out = m.out.At<T>(item, head) + row * m.out.row_stride;
        T* into = m.into_out.At<T>(item, head) + row * m.into_out.row_stride;
        if (lse == kMinusInfinity<T> || into_lse == kMinusInfinity<T>) {
          if (into_lse != kMinusInfinity<T>) continue;
          for (int64_t i = 0; i < m.out.dim; ++i) into[i] = lse == kMinusInfinity<T> ? T{0} : out[i];
          into_lse = lse;
          continue;
        }
        const T top = std::max(lse, into_lse);
        const T added = std::exp(lse - top), kept = std::exp(into_lse - top);
        const T by_added = added / (added + kept), by_kept = kept / (added + kept);
        for (int64_t i = 0; i < m.out.dim; ++i) into[i] = by_kept * into[i] + by_added * out[i];
        into_lse = top + std::log(added + kept);
      }
    }
    ctx.Poll();
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status AttentionForward(CpuTag, Context& ctx, const AttentionBlock& block,
                              const AttentionPartial& partial) {
  ArenaScope scope(ctx.scratch);
  ForwardTiles<T> tiles(ctx, block, partial);
  ForEachQueryTile(ctx, block,
                   [&](const QueryTile& tile, const KeyRange* ranges) { tiles.Run(tile, ranges); });
  return absl::OkStatus();
}

// The accumulator dtype is the compute dtype here: `out` carries.
template <typename T>
absl::Status AttentionForwardWhole(CpuTag device, Context& ctx, const AttentionBlock& block, HeadsRef out,
                                   TensorRef lse) {
  const AttentionPartial partial{out, lse};
  ANNULUS_RETURN_IF_ERROR(ResetPartial(device, ctx, partial));
  return AttentionForward<T>(device, ctx, block, partial);
}

template absl::Status MergePartials<float>(CpuTag, Context&, const PartialMerge&);
template absl::Status MergePartials<double>(CpuTag, Context&, const PartialMerge&);
template absl::Status AttentionForward<float>(CpuTag, Context&, const AttentionBlock&,
                                              const AttentionPartial&);
template absl::Status AttentionForward<double>(CpuTag, Context&, const AttentionBlock&,
                                               const AttentionPartial&);
template absl::Status AttentionForwardWhole<float>(CpuTag, Context&, const AttentionBlock&, HeadsRef,
                                                   TensorRef);
template absl::Status AttentionForwardWhole<double>(CpuTag, Context&, const AttentionBlock&, HeadsRef,
                                                    TensorRef);

}  // namespace annulus::kernels
