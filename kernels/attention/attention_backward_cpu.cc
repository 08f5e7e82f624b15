// Backward of block attention. The weights are recomputed from the LSE of all blocks together:
//   P = exp(S - LSE)   dP = dO V^T   dS = P (dP - delta)
//   dV += P^T dO       dK += dS^T (scale Q)       dQ += scale dS K
// A KV head's gradient sums over its query heads inside the products, because a tile holds the whole group.

#include <cmath>

#include "kernels/attention/attention_kernels.h"
#include "kernels/attention/attention_tile_cpu.h"
#include "kernels/common/vector_math.h"

namespace annulus::kernels {
namespace {

template <typename T>
class BackwardTiles {
 public:
  BackwardTiles(Context& ctx, const AttentionBlock& block, const AttentionGradients& gradients)
      : ctx_(ctx), block_(block), gradients_(gradients), dim_(block.q.dim), v_dim_(block.v.dim) {
    const int64_t height = MaxTileHeight(block);
    q_ = ScratchOf<T>(ctx, height * dim_);
    dq_ = ScratchOf<T>(ctx, height * dim_);
    dout_ = ScratchOf<T>(ctx, height * v_dim_);
    weights_ = ScratchOf<T>(ctx, height * kTileKeys);
    dscores_ = ScratchOf<T>(ctx, height * kTileKeys);
  }

  void Run(const QueryTile& tile, const KeyRange* ranges) {
    Pack(block_.q, tile, static_cast<T>(block_.scale), q_);
    Pack(gradients_.dout, tile, T{1}, dout_);
    std::fill_n(dq_, tile.height() * dim_, T{0});
    ForEachKeyTile(ctx_, tile, [&](const KeyRange& keys) { Step(tile, ranges, keys); });
    AddQueryGradient(tile);
  }

 private:
  void Step(const QueryTile& tile, const KeyRange* ranges, const KeyRange& keys) {
    const int64_t height = tile.height(), count = keys.size();
    MultiplyByKeys(q_, block_.k, tile, keys, weights_);
    MultiplyByKeys(dout_, block_.v, tile, keys, dscores_);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const KeyRange allowed = Within(ranges[r], keys);
      const int64_t stat = StatIndex(block_.q, tile, r);
      for (int64_t h = 0; h < tile.group; ++h) Differentiate(r * tile.group + h, stat + h, allowed, count);
    }
    Gemm<T>({.m = count,
             .n = v_dim_,
             .k = height,
             .a = {weights_, kTileKeys, Transpose::kYes},
             .b = {dout_, v_dim_},
             .beta = 1,
             .c = KeyRows(gradients_.dv, tile, keys.begin),
             .c_stride = std::max(gradients_.dv.row_stride, v_dim_)});
    Gemm<T>({.m = count,
             .n = dim_,
             .k = height,
             .a = {dscores_, kTileKeys, Transpose::kYes},
             .b = {q_, dim_},
             .beta = 1,
             .c = KeyRows(gradients_.dk, tile, keys.begin),
             .c_stride = std::max(gradients_.dk.row_stride, dim_)});
    Gemm<T>({.m = height,
             .n = dim_,
             .k = count,
             .alpha = static_cast<T>(block_.scale),
             .a = {dscores_, kTileKeys},
             .b = KeyOperand<T>(block_.k, tile, keys.begin),
             .beta = 1,
             .c = dq_,
             .c_stride = dim_});
  }

  // Scores and dP of tile row m become P and dS; zeros outside `allowed` and where no key of any block was.
  void Differentiate(int64_t m, int64_t stat, const KeyRange& allowed, int64_t count) {
    T* weight = weights_ + m * kTileKeys;
    T* dscore = dscores_ + m * kTileKeys;
    const T lse = gradients_.lse.template data<T>()[stat];
    const T delta = gradients_.delta.template data<T>()[stat];
    if (allowed.empty() || lse == -std::numeric_limits<T>::infinity()) {
      std::fill_n(weight, count, T{0});
      std::fill_n(dscore, count, T{0});
      return;
    }
#pragma omp simd
    for (int64_t j = allowed.begin; j < allowed.end; ++j) {
      weight[j] = Exp(weight[j] - lse);
      dscore[j] = weight[j] * (dscore[j] - delta);
    }
    for (T* row : {weight, dscore}) ZeroOutside(allowed, count, row);
  }

  void AddQueryGradient(const QueryTile& tile) {
    const int64_t width = tile.group * dim_;
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* dq = TileRows<T>(gradients_.dq, tile) + r * gradients_.dq.row_stride;
      const T* from = dq_ + r * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) dq[i] += from[i];
    }
  }

  static T* KeyRows(const HeadsRef& x, const QueryTile& tile, int64_t begin) {
    return x.At<T>(tile.item, tile.kv_head) + begin * x.row_stride;
  }

  Context& ctx_;
  const AttentionBlock& block_;
  const AttentionGradients& gradients_;
  const int64_t dim_, v_dim_;
  T* q_;        // [height, dim], scaled
  T* dq_;       // [height, dim]
  T* dout_;     // [height, v_dim]
  T* weights_;  // [height, kTileKeys]: scores, then P
  T* dscores_;  // [height, kTileKeys]: dP, then dS
};

}  // namespace

template <typename T>
absl::Status AttentionDelta(CpuTag, Context&, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta) {
  T* to = delta.data<T>();
  for (int64_t row = 0; row < out.rows; ++row) {
    for (int64_t item = 0; item < out.batch; ++item) {
      const T* o = out.At<T>(item, 0) + row * out.row_stride;
      const T* d = dout.At<T>(item, 0) + row * dout.row_stride;
      for (int64_t h = 0; h < out.heads; ++h, o += out.dim, d += out.dim) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < out.dim; ++i) sum += o[i] * d[i];
        *to++ = sum;
      }
    }
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status AttentionBackward(CpuTag, Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients) {
  if (gradients.kv_write == Write::kOverwrite) {
    for (const HeadsRef& gradient : {gradients.dk, gradients.dv}) ZeroHeads<T>(gradient);
  }
  ArenaScope scope(ctx.scratch);
  BackwardTiles<T> tiles(ctx, block, gradients);
  ForEachQueryTile(ctx, block,
                   [&](const QueryTile& tile, const KeyRange* ranges) { tiles.Run(tile, ranges); });
  return absl::OkStatus();
}

template <typename T>
absl::Status AttentionBackwardWhole(CpuTag device, Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients) {
  for (const HeadsRef& gradient : {gradients.dq, gradients.dk, gradients.dv}) ZeroHeads<T>(gradient);
  return AttentionBackward<T>(device, ctx, block, gradients);
}

template absl::Status AttentionDelta<float>(CpuTag, Context&, ConstHeadsRef, ConstHeadsRef, TensorRef);
template absl::Status AttentionDelta<double>(CpuTag, Context&, ConstHeadsRef, ConstHeadsRef, TensorRef);
template absl::Status AttentionBackward<float>(CpuTag, Context&, const AttentionBlock&,
                                               const AttentionGradients&);
template absl::Status AttentionBackward<double>(CpuTag, Context&, const AttentionBlock&,
                                                const AttentionGradients&);
template absl::Status AttentionBackwardWhole<float>(CpuTag, Context&, const AttentionBlock&,
                                                    const AttentionGradients&);
template absl::Status AttentionBackwardWhole<double>(CpuTag, Context&, const AttentionBlock&,
                                                     const AttentionGradients&);

}  // namespace annulus::kernels
