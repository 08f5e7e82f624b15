#include "kernels/attention/attention_heads_cuda.h"
#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/attention/cudnn_attention.h"
#include "kernels/attention/cudnn_attention_ops.h"
#include "kernels/common/cuda_libraries.h"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {
namespace {

// Of one item the library wants the stride that a second one would have.
CudnnStrides StridesOf(const ConstHeadsRef& x) {
  return {x.row_stride, x.batch > 1 ? x.batch_stride : x.rows * x.row_stride};
}

CudnnBlock Describe(const AttentionBlock& block, const ConstHeadsRef& out) {
  return {.batch = block.q.batch,
          .heads = block.q.heads,
          .kv_heads = block.k.heads,
          .q_rows = block.q.rows,
          .k_rows = block.k.rows,
          .dim = block.q.dim,
          .v_dim = block.v.dim,
          .mask = block.mask_shape == MaskShape::kCausal ? CudnnMask::kCausal : CudnnMask::kFull,
          .scale = static_cast<float>(block.scale),
          .q = StridesOf(block.q),
          .k = StridesOf(block.k),
          .v = StridesOf(block.v),
          .out = StridesOf(out),
          .dout = {},
          .dq = {},
          .dk = {},
          .dv = {}};
}

CudnnCall CallWith(Context& ctx, int64_t workspace_bytes) {
  return {.workspace = ctx.scratch.Allocate(DType::kU8, {workspace_bytes}).raw(),
          .workspace_bytes = workspace_bytes,
          .stream = ctx.stream()};
}

float* LseScratch(Context& ctx, const ConstHeadsRef& q) {
  return ctx.scratch.Allocate(DType::kF32, {q.batch, q.heads, q.rows}).data<float>();
}

// lse: [batch, heads, q_rows]
absl::Status RunForward(Context& ctx, const AttentionBlock& block, const HeadsRef& out, float* lse) {
  CudnnAttention& cudnn = LibrariesOf(ctx).Cudnn();
  const CudnnBlock described = Describe(block, out);
  ANNULUS_ASSIGN_OR_RETURN(const int64_t bytes, cudnn.ForwardWorkspaceBytes(described));
  return cudnn.Forward(described, {block.q.data, block.k.data, block.v.data, out.data, lse},
                       CallWith(ctx, bytes));
}

// Overwrites dq, dk and dv, which are bf16.
absl::Status RunBackward(Context& ctx, const AttentionBlock& block, const AttentionGradients& g) {
  CudnnAttention& cudnn = LibrariesOf(ctx).Cudnn();
  CudnnBlock described = Describe(block, g.out);
  described.dout = StridesOf(g.dout);
  described.dq = StridesOf(g.dq);
  described.dk = StridesOf(g.dk);
  described.dv = StridesOf(g.dv);
  ANNULUS_ASSIGN_OR_RETURN(const int64_t bytes, cudnn.BackwardWorkspaceBytes(described));
  const ConstHeadsRef& q = block.q;
  float* lse = LseScratch(ctx, q);
  const CopyLseArgs to_library{.rows = q.rows,
                               .batch = q.batch,
                               .heads = q.heads,
                               .from = RowsFirst(g.lse.data<float>(), q.batch, q.heads),
                               .to = RowsLast(lse, q.rows, q.heads)};
  ANNULUS_RETURN_IF_ERROR(CudaStatus("attention: copy of the LSE", CudaCopyLse(to_library, ctx.stream())));
  return cudnn.Backward(described,
                        {.q = block.q.data,
                         .k = block.k.data,
                         .v = block.v.data,
                         .out = g.out.data,
                         .dout = g.dout.data,
                         .lse = lse,
                         .dq = g.dq.data,
                         .dk = g.dk.data,
                         .dv = g.dv.data},
                        CallWith(ctx, bytes));
}

// y (=, +=) x
absl::Status WriteTo(Context& ctx, const ConstHeadsRef& x, Write write, const HeadsRef& y) {
  const auto from = StridedOf<BFloat16>(x);
  const auto to = StridedOf<float>(y);
  return CudaStatus("attention: sum of a block's gradients",
                    write == Write::kOverwrite
                        ? CudaCastRows<__nv_bfloat16, float>(RowsOf(x), from, to, ctx.stream())
                        : CudaAddRows<__nv_bfloat16, float>(RowsOf(x), from, to, ctx.stream()));
}

}  // namespace

absl::Status CudnnForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial) {
  ArenaScope scope(ctx.scratch);
  const ConstHeadsRef& q = block.q;
  const HeadsRef out = ScratchLike(ctx, DType::kBF16, partial.out);
  float* lse = LseScratch(ctx, q);
  ANNULUS_RETURN_IF_ERROR(RunForward(ctx, block, out, lse));
  const MergeBlockArgs<__nv_bfloat16> args{.rows = q.rows,
                            .batch = q.batch,
                            .heads = q.heads,
                            .dim = out.dim,
                            .block_out = CudaHeadsOf<BFloat16>(ConstHeadsRef(out)),
                            .block_lse = RowsLast<const float>(lse, q.rows, q.heads),
                            .out = CudaHeadsOf<float>(partial.out),
                            .lse = RowsFirst(partial.lse.data<float>(), q.batch, q.heads)};
  return CudaStatus("attention: merge of a block", CudaMergeBlock(args, ctx.stream()));
}

absl::Status CudnnForwardWhole(Context& ctx, const AttentionBlock& block, HeadsRef out, TensorRef lse) {
  ArenaScope scope(ctx.scratch);
  const ConstHeadsRef& q = block.q;
  float* rows_last = LseScratch(ctx, q);
  ANNULUS_RETURN_IF_ERROR(RunForward(ctx, block, out, rows_last));
  const CopyLseArgs to_rows_first{.rows = q.rows,
                                  .batch = q.batch,
                                  .heads = q.heads,
                                  .from = RowsLast<const float>(rows_last, q.rows, q.heads),
                                  .to = RowsFirst(lse.data<float>(), q.batch, q.heads)};
  return CudaStatus("attention: copy of the LSE", CudaCopyLse(to_rows_first, ctx.stream()));
}

absl::Status CudnnBackward(Context& ctx, const AttentionBlock& block, const AttentionGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  AttentionGradients own = gradients;
  own.dq = ScratchLike(ctx, DType::kBF16, gradients.dq);
  own.dk = ScratchLike(ctx, DType::kBF16, gradients.dk);
  own.dv = ScratchLike(ctx, DType::kBF16, gradients.dv);
  ANNULUS_RETURN_IF_ERROR(RunBackward(ctx, block, own));
  ANNULUS_RETURN_IF_ERROR(WriteTo(ctx, own.dq, Write::kAccumulate, gradients.dq));
  ANNULUS_RETURN_IF_ERROR(WriteTo(ctx, own.dk, gradients.kv_write, gradients.dk));
  return WriteTo(ctx, own.dv, gradients.kv_write, gradients.dv);
}

absl::Status CudnnBackwardWhole(Context& ctx, const AttentionBlock& block,
                                const AttentionGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  return RunBackward(ctx, block, gradients);
}

}  // namespace annulus::kernels
