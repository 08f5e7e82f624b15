#include "annulus/parallel/latent_expansion.h"

namespace annulus {

LatentWeights LatentWeights::Heads(const LatentShape& shape, int64_t begin, int64_t end) const {
  const int64_t rows = shape.nope + shape.v;
  const auto own = [&](TensorRef all) { return all.defined() ? all.Rows(begin * rows, end * rows) : all; };
  return {.up = own(up), .dup = own(dup)};
}

absl::Status ExpandLatents(Context& ctx, const LatentShape& shape, const LatentWeights& weights,
                           ConstTensorRef latents, TensorRef kv) {
  ArenaScope scope(ctx.scratch);
  const int64_t tokens = latents.dim(0) * latents.dim(1), columns = weights.up.dim(0);
  const LatentHeads heads = shape.Heads(columns / (shape.nope + shape.v));
  const ConstMatrixRef rows = latents;
  const TensorRef expanded = ctx.scratch.Allocate(kv.dtype(), {tokens, columns});
  ANNULUS_RETURN_IF_ERROR(
      LinearForward(ctx, rows.Cols(0, shape.columns), weights.up, Write::kOverwrite, expanded));
  return PackLatentKv(ctx, heads, expanded, rows.Cols(shape.columns, shape.row()), kv);
}

absl::Status ExpandLatentsBackward(Context& ctx, const LatentShape& shape, const LatentWeights& weights,
                                   ConstTensorRef latents, ConstTensorRef dkv, Write write,
                                   TensorRef dlatents) {
  ArenaScope scope(ctx.scratch);
  const int64_t tokens = latents.dim(0) * latents.dim(1), columns = weights.up.dim(0);
  const LatentHeads heads = shape.Heads(columns / (shape.nope + shape.v));
  const ConstMatrixRef own = ConstMatrixRef(latents).Cols(0, shape.columns);
  const TensorRef dexpanded = ctx.scratch.Allocate(latents.dtype(), {tokens, columns});
  const MatrixRef gradient = dlatents;
  const MatrixRef dk_rope = gradient.Cols(shape.columns, shape.row());
  ANNULUS_RETURN_IF_ERROR(UnpackLatentKvGradient(ctx, heads, dkv, dexpanded, write, dk_rope));
  ANNULUS_RETURN_IF_ERROR(
      LinearBackwardInput(ctx, dexpanded, weights.up, write, gradient.Cols(0, shape.columns)));
  return LinearBackwardWeight(ctx, dexpanded, own, weights.dup);
}

}  // namespace annulus
