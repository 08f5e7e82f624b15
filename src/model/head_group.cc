#include "head_group.h"

#include "annulus/ops/columns.h"

namespace annulus {
absl::StatusOr<TensorRef> GatherHeads(Context& ctx, ModelStep& step, int ranks, TensorRef x) {
  if (ranks == 1) return x;
  const int64_t columns = x.dim(2);
  const TensorRef all = ctx.scratch.Allocate(x.dtype(), {x.dim(0), x.dim(1), ranks * columns});
  ArenaScope scope(ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const TensorParallel group, step.tensor.Neighbours(ranks));
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef gathered,
                           group.Gather(ctx, x.Reshaped({step.tokens(), columns})));
  for (int r = 0; r < ranks; ++r) {
    const ConstTensorRef block =
        gathered.Rows(r * step.tokens(), (r + 1) * step.tokens()).Reshaped(x.shape());
    const ColumnRun run{.from = 0, .to = r * columns, .columns = columns};
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, block, {&run, 1}, Write::kOverwrite, all));
  }
  return all;
}

absl::StatusOr<TensorRef> SumHeads(Context& ctx, ModelStep& step, int ranks, TensorRef all) {
  if (ranks == 1) return all;
  const int64_t columns = all.dim(2) / ranks;
  const TensorRef own = ctx.scratch.Allocate(all.dtype(), {all.dim(0), all.dim(1), columns});
  const TensorRef flat = own.Reshaped({step.tokens(), columns});
  ArenaScope scope(ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const TensorParallel group, step.tensor.Neighbours(ranks));
  const TensorRef blocks = group.Partial(ctx, flat);
  for (int r = 0; r < ranks; ++r) {
    const TensorRef block = blocks.Rows(r * step.tokens(), (r + 1) * step.tokens()).Reshaped(own.shape());
    const ColumnRun run{.from = r * columns, .to = 0, .columns = columns};
    ANNULUS_RETURN_IF_ERROR(MoveColumns(ctx, all, {&run, 1}, Write::kOverwrite, block));
  }
  ANNULUS_ASSIGN_OR_RETURN(PendingSum sum, group.StartSum(ctx, blocks, Write::kOverwrite, flat));
  ANNULUS_RETURN_IF_ERROR(sum.Finish(ctx));
  return own;
}

}  // namespace annulus
