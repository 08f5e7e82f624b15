// Forward of block attention: per query tile an online softmax over key tiles (Milakov and Gimelshein, 2018)
// that starts from the carry. A previous partial is the state (acc, m, l) itself where it has a sum; (O, LSE)
// is the state (O, LSE, 1), because the sum of exp(s - LSE) is one by the definition of LSE.

#include <cmath>

#include "kernels/attention/attention_kernels.h"
#include "kernels/attention/attention_tile_cpu.h"
#include "kernels/common/vector_math.h"

namespace annulus::kernels {
namespace {

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// From sums relative to exp(*lse): sum > 0 of the weights, and of the values in out[dim].
template <typename T>
void Normalize(T sum, int64_t dim, T* out, T* lse) {
  const T inverse = T{1} / sum;
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) out[i] *= inverse;
  *lse += std::log(sum);
}

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
    const T *lse = partial_.lse.template data<T>(), *sum = Sums();
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* out = TileRows<T>(partial_.out, tile) + r * partial_.out.row_stride;
      for (int64_t h = 0; h < tile.group; ++h) {
        const int64_t m = r * tile.group + h;
        const int64_t stat = StatIndex(block_.q, tile, r) + h;
        max_[m] = lse[stat];
        const bool no_keys_yet = max_[m] == kMinusInfinity<T>;
        sum_[m] = no_keys_yet ? T{0} : sum == nullptr ? T{1} : sum[stat];
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
    T *lse = partial_.lse.template data<T>(), *sum = Sums();
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (ranges[r].empty()) continue;
      T* out = TileRows<T>(partial_.out, tile) + r * partial_.out.row_stride;
      for (int64_t h = 0; h < tile.group; ++h) {
        const int64_t m = r * tile.group + h, stat = StatIndex(block_.q, tile, r) + h;
        T* to = out + h * v_dim_;
        std::copy_n(acc_ + m * v_dim_, v_dim_, to);
        lse[stat] = max_[m];
        if (sum == nullptr) {
          Normalize(sum_[m], v_dim_, to, &lse[stat]);
        } else {
          sum[stat] = sum_[m];
        }
      }
    }
  }

  T* Sums() const { return partial_.has_sum() ? partial_.sum.template data<T>() : nullptr; }

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
    if (partial.has_sum()) std::fill_n(partial.sum.data<T>(), partial.sum.elements(), T{0});
    return absl::OkStatus();
  });
}

absl::Status FinishPartial(CpuTag, Context& ctx, const AttentionPartial& partial) {
  return VisitFloat(partial.out.dtype, [&]<class T>() {
    const HeadsRef& out = partial.out;
    T* lse = partial.lse.data<T>();
    const T* sum = partial.sum.data<T>();
    for (int64_t row = 0; row < out.rows; ++row) {
      for (int64_t item = 0; item < out.batch; ++item) {
        for (int64_t head = 0; head < out.heads; ++head, ++lse, ++sum) {
          if (*sum > 0) Normalize(*sum, out.dim, out.At<T>(item, head) + row * out.row_stride, lse);
        }
      }
      ctx.Poll();
    }
    return absl::OkStatus();
  });
}

template <typename T>
absl::Status MergePartials(CpuTag, Context& ctx, const PartialMerge& m) {
  const auto at = [](const auto& x, int64_t row, int64_t item, int64_t head) {
    return x.template At<T>(item, head) + row * x.row_stride;
  };
  for (int64_t row = 0; row < m.out.rows; ++row) {
    for (int64_t item = 0; item < m.out.batch; ++item) {
      for (int64_t head = 0; head < m.out.heads; ++head) {
        const T lse = *at(m.lse, row, item, head), *out = at(m.out, row, item, head);
        T &into_lse = *at(m.into_lse, row, item, head), *into = at(m.into_out, row, item, head);
        // A normalised result is one of sum 1.
        const T sum = m.has_sums() ? *at(m.sum, row, item, head) : T{1};
        T normalised = 1;
        T& into_sum = m.has_sums() ? *at(m.into_sum, row, item, head) : normalised;
        if (lse == kMinusInfinity<T> || into_lse == kMinusInfinity<T>) {
          if (into_lse != kMinusInfinity<T>) continue;
          const bool empty = lse == kMinusInfinity<T>;
          for (int64_t i = 0; i < m.out.dim; ++i) into[i] = empty ? T{0} : out[i];
          into_lse = lse, into_sum = empty ? T{0} : sum;
          continue;
        }
        const T top = std::max(lse, into_lse);
        const T added = std::exp(lse - top), kept = std::exp(into_lse - top);
        for (int64_t i = 0; i < m.out.dim; ++i) into[i] = kept * into[i] + added * out[i];
        into_sum = kept * into_sum + added * sum;
        into_lse = top;
        if (!m.has_sums()) Normalize(into_sum, m.out.dim, into, &into_lse);
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
  const AttentionPartial partial{.out = out, .lse = lse};
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
