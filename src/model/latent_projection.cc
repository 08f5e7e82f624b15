#include "latent_projection.h"

#include "annulus/ops/columns.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"

namespace annulus {
namespace {

constexpr double kEps = 1e-6;  // of the latents' norms, whatever the model's

TensorRef WithBatch(TensorRef x) { return x.Reshaped({x.dim(0), 1, x.dim(1)}); }

// Columns [begin, ..) of packed rows, in rows of their own and back.
absl::Status PutColumns(Context& ctx, TensorRef part, int64_t begin, TensorRef packed) {
  const ColumnRun run{.from = 0, .to = begin, .columns = part.dim(1)};
  return MoveColumns(ctx, WithBatch(part), {&run, 1}, Write::kOverwrite, WithBatch(packed));
}
absl::Status TakeColumns(Context& ctx, TensorRef packed, int64_t begin, TensorRef part) {
  const ColumnRun run{.from = begin, .to = 0, .columns = part.dim(1)};
  return MoveColumns(ctx, WithBatch(packed), {&run, 1}, Write::kOverwrite, WithBatch(part));
}

}  // namespace

LatentProjection::LatentProjection(const MixerArgs& args)
    : q_rank_(args.spec.latent.q_rank),
      width_(args.spec.latent.kv_rank / args.branch_spec().latent_groups),
      branches_(args.branch_spec().latent_groups),
      rope_dim_(args.spec.latent.rope_dim),
      rope_(RopeOf(args.spec, args.branch_spec(), args.spec.latent.rope_dim)) {
  const ParamTable& table = args.params.table();
  const std::string prefix = args.prefix();
  const auto find = [&](const char* name, TensorRef* value, TensorRef* gradient) {
    const int index = table.IndexOf(prefix + name);
    *value = args.params.Value(index), *gradient = args.params.Grad(index);
  };
  if (q_rank_ > 0) {
    find("q_down.weight", &q_down_, &dq_down_);
    find("q_norm.weight", &q_norm_, &dq_norm_);
  }
  find("kv_down.weight", &kv_down_, &dkv_down_);
  find("kv_norm.weight", &kv_norm_, &dkv_norm_);
  find("k_rope.weight", &k_rope_, &dk_rope_);
}

std::vector<LatentProjection::Normalized> LatentProjection::Parts() const {
  std::vector<Normalized> parts;
  if (q_rank_ > 0) {
    parts.push_back({.column = 0, .down = q_down_, .ddown = dq_down_, .norm = q_norm_, .dnorm = dq_norm_});
  }
  for (int64_t b = 0; b < branches_; ++b) {
    const auto own = [&](TensorRef all) { return all.Rows(b * width_, (b + 1) * width_); };
    parts.push_back({.column = BranchBegin(b),
                     .down = own(kv_down_),
                     .ddown = own(dkv_down_),
                     .norm = own(kv_norm_),
                     .dnorm = own(dkv_norm_)});
  }
  return parts;
}

namespace {

// In the order of the parts.
std::vector<TensorRef> NormalizedOf(const LatentProducts& products) {
  std::vector<TensorRef> all;
  if (products.q.defined()) all.push_back(products.q);
  all.insert(all.end(), products.branches.begin(), products.branches.end());
  return all;
}

}  // namespace

absl::StatusOr<LatentProducts> LatentProjection::Project(Context& ctx, ModelStep& step, Arena& arena,
                                                         ConstTensorRef x) const {
  LatentProducts products;
  const auto allocate = [&](int64_t columns) { return arena.Allocate(x.dtype(), {x.dim(0), columns}); };
  if (q_rank_ > 0) products.q = allocate(q_rank_);
  for (int64_t b = 0; b < branches_; ++b) products.branches.push_back(allocate(width_));
  products.k_rope = allocate(rope_dim_);
  const std::vector<Normalized> parts = Parts();
  const std::vector<TensorRef> normalized = NormalizedOf(products);
  for (size_t i = 0; i < parts.size(); ++i) {
    ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, parts[i].down, Write::kOverwrite, normalized[i]));
  }
  ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, k_rope_, Write::kOverwrite, products.k_rope));
  ANNULUS_RETURN_IF_ERROR(Rotate(ctx, step, RopeDirection::kForward, products.k_rope));
  return products;
}

absl::Status LatentProjection::Rotate(Context& ctx, ModelStep& step, RopeDirection direction,
                                      TensorRef k_rope) const {
  if (!rope_.has_value()) return absl::OkStatus();
  // The ranks of a tensor-parallel group split whole rows.
  const int64_t rows = k_rope.dim(0) / step.batch(), first = step.tensor.rank() * rows;
  const TensorRef heads = k_rope.Reshaped({rows, step.batch(), rope_dim_});
  return Rope(ctx, step.geometry.Positions(ctx).Rows(first, first + rows), *rope_, direction,
              HeadsOf(heads, 0, 1, rope_dim_));
}

absl::Status LatentProjection::Normalize(Context& ctx, const LatentProducts& products,
                                         TensorRef packed) const {
  const std::vector<Normalized> parts = Parts();
  const std::vector<TensorRef> normalized = NormalizedOf(products);
  for (size_t i = 0; i < parts.size(); ++i) {
    ArenaScope scope(ctx.scratch);
    const TensorRef y = ctx.scratch.Allocate(packed.dtype(), normalized[i].shape());
    ANNULUS_RETURN_IF_ERROR(RmsNormForward(ctx, normalized[i], parts[i].norm, kEps, y));
    ANNULUS_RETURN_IF_ERROR(PutColumns(ctx, y, parts[i].column, packed));
  }
  return PutColumns(ctx, products.k_rope, RopeBegin(), packed);
}

absl::Status LatentProjection::Backward(Context& ctx, ModelStep& step, ConstTensorRef x,
                                        const LatentProducts& products, TensorRef dpacked, Write write,
                                        TensorRef dx) const {
  ArenaScope scope(ctx.scratch);
  const TensorRef dk_rope = ctx.scratch.Allocate(x.dtype(), products.k_rope.shape());
  ANNULUS_RETURN_IF_ERROR(TakeColumns(ctx, dpacked, RopeBegin(), dk_rope));
  ANNULUS_RETURN_IF_ERROR(Rotate(ctx, step, RopeDirection::kGradient, dk_rope));
  ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dk_rope, k_rope_, write, dx));
  ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dk_rope, x, dk_rope_));
  const std::vector<Normalized> parts = Parts();
  const std::vector<TensorRef> normalized = NormalizedOf(products);
  for (size_t i = 0; i < parts.size(); ++i) {
    ArenaScope of_part(ctx.scratch);
    const Normalized& part = parts[i];
    const TensorRef dy = ctx.scratch.Allocate(x.dtype(), normalized[i].shape());
    const TensorRef dproduct = ctx.scratch.Allocate(x.dtype(), normalized[i].shape());
    ANNULUS_RETURN_IF_ERROR(TakeColumns(ctx, dpacked, part.column, dy));
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, dproduct));
    ANNULUS_RETURN_IF_ERROR(RmsNormBackward(ctx, normalized[i], part.norm, dy, kEps, dproduct, part.dnorm));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, dproduct, part.down, Write::kAccumulate, dx));
    ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, dproduct, x, part.ddown));
  }
  return absl::OkStatus();
}

}  // namespace annulus
