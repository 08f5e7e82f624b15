// From the attention ops to the CUDA kernels: f32 arithmetic for f32, for bf16 the kernel that is chosen
// (attention_choice.cc).

#include "kernels/attention/attention_f32_cuda.h"
#include "kernels/attention/attention_heads_cuda.h"
#include "kernels/attention/attention_hopper_arena.h"
#include "kernels/attention/attention_kernels.h"
#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/attention/attention_mma.h"
#include "kernels/attention/attention_partial_cuda.h"
#include "kernels/common/cuda_call.h"
#include "kernels/elementwise/elementwise_cuda.h"
#if ANNULUS_HAS_CUDNN
#include "kernels/attention/cudnn_attention_ops.h"
#endif

namespace annulus::kernels {
namespace {

template <typename T>
constexpr bool kBf16 = std::is_same_v<T, BFloat16>;

// 16-byte accesses: every row of every head starts on 16 bytes.
absl::Status CheckAligned(absl::string_view name, const ConstHeadsRef& x) {
  const int64_t unit = 16 / SizeOf(x.dtype);
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data) % 16);
  if (offset != 0 || (x.rows > 1 && x.row_stride % unit != 0) ||
      (x.batch > 1 && x.batch_stride % unit != 0)) {
    return Invalid(name, ": address ", offset, " past a multiple of 16 bytes, row_stride=", x.row_stride,
                   ", batch_stride=", x.batch_stride, ": expected heads on 16 bytes, strides multiples of ",
                   unit);
  }
  return absl::OkStatus();
}

struct NamedHeads {
  absl::string_view name;
  ConstHeadsRef heads;
};

// What the kernels for T support. `others`: what the op has besides the block.
template <typename T>
absl::Status CheckSupported(const AttentionBlock& block, std::initializer_list<NamedHeads> others) {
  const int64_t dim = block.q.dim, v_dim = block.v.dim;
  if (!(block.scale > 0)) return Invalid("attention.scale=", block.scale, ": expected above 0");
  if constexpr (!kBf16<T>) {
    if (!F32AttentionSupports(dim, v_dim)) {
      return Invalid("attention: heads of ", dim, " with values of ", v_dim,
                     " in f32 on a GPU: expected at most 256");
    }
  } else {
    if (!TensorCoreDims(dim, v_dim)) {
      return Invalid("attention: heads of ", dim, " with values of ", v_dim,
                     " in bf16 on a GPU: expected 64 with 64, 128 with 128, or 192 with 128");
    }
    ANNULUS_RETURN_IF_ERROR(CheckAligned("attention.q", block.q));
    ANNULUS_RETURN_IF_ERROR(CheckAligned("attention.k", block.k));
    ANNULUS_RETURN_IF_ERROR(CheckAligned("attention.v", block.v));
    for (const NamedHeads& x : others) ANNULUS_RETURN_IF_ERROR(CheckAligned(x.name, x.heads));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status CheckSupported(const AttentionBlock& block, const AttentionGradients& g) {
  return CheckSupported<T>(block, {{"attention.out", g.out},
                                   {"attention.dout", g.dout},
                                   {"attention.dq", g.dq},
                                   {"attention.dk", g.dk},
                                   {"attention.dv", g.dv}});
}

bool NoPairs(const AttentionBlock& block) {
  return block.q.rows * block.q.batch * block.q.heads == 0 || block.k.rows == 0;
}

// cuDNN has no backward for one query row; that row costs the other kernel nothing.
[[maybe_unused]] bool UseCudnn(const Context& ctx, const AttentionBlock& block, Pass pass) {
  return block.q.rows > 1 && !NoPairs(block) && KernelFor(ctx, block, pass) == AttentionKernel::kCudnn;
}

bool UseHopper(const Context& ctx, const AttentionBlock& block, Pass pass) {
  return !NoPairs(block) && KernelFor(ctx, block, pass) == AttentionKernel::kHopper;
}

void* Workspace(Context& ctx, int64_t bytes) { return ctx.scratch.Allocate(DType::kU8, {bytes}).raw(); }

template <typename T>
CudaAttentionBlock<CudaType<T>> CudaBlockOf(const AttentionBlock& block) {
  return {.q = CudaHeadsOf<T>(block.q),
          .k = CudaHeadsOf<T>(block.k),
          .v = CudaHeadsOf<T>(block.v),
          .q_rows = block.q.rows,
          .k_rows = block.k.rows,
          .batch = block.q.batch,
          .heads = block.q.heads,
          .kv_heads = block.k.heads,
          .dim = block.q.dim,
          .v_dim = block.v.dim,
          .lo = block.bounds.lo.data<int64_t>(),
          .hi = block.bounds.hi.data<int64_t>(),
          .key_offset = block.key_positions.offset,
          .key_stride = block.key_positions.stride,
          .scale = static_cast<float>(block.scale)};
}

// Folds the block into `partial` and, where `result` is given, writes the outcome there in bf16.
template <typename T>
absl::Status LaunchForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial,
                           const HeadsRef& result) {
  CudaAttentionPartial<CudaType<T>> to{
      .out = CudaHeadsOf<float>(partial.out), .lse = CudaData<float>(partial.lse), .result = {}};
  if (result.data != nullptr) to.result = CudaHeadsOf<T>(result);
  const CudaAttentionBlock<CudaType<T>> cuda_block = CudaBlockOf<T>(block);
  if constexpr (kBf16<T>) {
    if (UseHopper(ctx, block, Pass::kForward)) {
      ArenaScope scope(ctx.scratch);
      void* workspace = Workspace(ctx, HopperAttentionForwardWorkspaceBytes(cuda_block));
      return CudaStatus("attention forward, hopper",
                        HopperAttentionForward(cuda_block, to, workspace, ctx.stream()));
    }
    return CudaStatus("attention forward", MmaAttentionForward(cuda_block, to, ctx.stream()));
  } else {
    return CudaStatus("attention forward", F32AttentionForward(cuda_block, to, ctx.stream()));
  }
}

// Adds to dq, dk and dv, which are f32.
template <typename T>
absl::Status LaunchBackward(Context& ctx, const AttentionBlock& block, const AttentionGradients& g) {
  const CudaAttentionBlock<CudaType<T>> cuda_block = CudaBlockOf<T>(block);
  const CudaAttentionGradients<CudaType<T>> gradients{.dout = CudaHeadsOf<T>(g.dout),
                                                      .lse = g.lse.data<float>(),
                                                      .delta = g.delta.data<float>(),
                                                      .dq = CudaHeadsOf<float>(g.dq),
                                                      .dk = CudaHeadsOf<float>(g.dk),
                                                      .dv = CudaHeadsOf<float>(g.dv)};
  if constexpr (kBf16<T>) {
    ArenaScope scope(ctx.scratch);
    const MmaQueryGradient order =
        ctx.determinism == Determinism::kRequired ? MmaQueryGradient::kOrdered : MmaQueryGradient::kAtomic;
    if (UseHopper(ctx, block, Pass::kBackward)) {
      void* workspace = Workspace(ctx, HopperAttentionBackwardWorkspaceBytes(cuda_block, order));
      return CudaStatus("attention backward, hopper",
                        HopperAttentionBackward(cuda_block, gradients, order, workspace, ctx.stream()));
    }
    void* workspace = Workspace(ctx, MmaAttentionBackwardWorkspaceBytes(cuda_block, order));
    return CudaStatus("attention backward",
                      MmaAttentionBackward(cuda_block, gradients, order, workspace, ctx.stream()));
  } else {
    return CudaStatus("attention backward", F32AttentionBackward(cuda_block, gradients, ctx.stream()));
  }
}

absl::Status Zero(Context& ctx, const HeadsRef& x) {
  const auto size = static_cast<size_t>(SizeOf(x.dtype));
  const size_t width = static_cast<size_t>(x.heads * x.dim) * size;
  for (int64_t item = 0; item < x.batch; ++item) {
    char* rows = static_cast<char*>(x.data) + item * x.batch_stride * static_cast<int64_t>(size);
    // The pitch of a single row may be anything; the call wants at least the width.
    const size_t pitch = x.rows > 1 ? static_cast<size_t>(x.row_stride) * size : width;
    ANNULUS_RETURN_IF_ERROR(
        CudaStatus("attention: zeros",
                   cudaMemset2DAsync(rows, pitch, 0, width, static_cast<size_t>(x.rows), ctx.stream())));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ResetPartial(CudaTag, Context& ctx, const AttentionPartial& partial) {
  const HeadsRef& out = partial.out;
  const CudaResetPartialArgs args{.rows = out.rows,
                                  .batch = out.batch,
                                  .heads = out.heads,
                                  .v_dim = out.dim,
                                  .out = CudaHeadsOf<float>(out),
                                  .lse = CudaData<float>(partial.lse)};
  return CudaStatus("attention: reset of a partial result", CudaResetPartial(args, ctx.stream()));
}

template <typename T>
absl::Status MergePartials(CudaTag, Context& ctx, const PartialMerge& m) {
  // Heads of one element each: their stride is 1.
  const MergeBlockArgs<CudaType<T>> args{
      .rows = m.out.rows,
      .batch = m.out.batch,
      .heads = m.out.heads,
      .dim = m.out.dim,
      .block_out = CudaHeadsOf<T>(m.out),
      .block_lse = {CudaData<float>(m.lse), m.lse.row_stride, m.lse.batch_stride, 1},
      .out = CudaHeadsOf<float>(m.into_out),
      .lse = {CudaData<float>(m.into_lse), m.into_lse.row_stride, m.into_lse.batch_stride, 1}};
  return CudaStatus("attention: merge of partial results", CudaMergeBlock(args, ctx.stream()));
}

template <typename T>
absl::Status AttentionForward(CudaTag, Context& ctx, const AttentionBlock& block,
                              const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckSupported<T>(block, {{"attention.out", partial.out}}));
  if (NoPairs(block)) return absl::OkStatus();
#if ANNULUS_HAS_CUDNN
  if (UseCudnn(ctx, block, Pass::kForward)) return CudnnForward(ctx, block, partial);
#endif
  return LaunchForward<T>(ctx, block, partial, {});
}

template <typename T>
absl::Status AttentionForwardWhole(CudaTag device, Context& ctx, const AttentionBlock& block, HeadsRef out,
                                   TensorRef lse) {
  ANNULUS_RETURN_IF_ERROR(CheckSupported<T>(block, {{"attention.out", out}}));
#if ANNULUS_HAS_CUDNN
  if (UseCudnn(ctx, block, Pass::kForward)) return CudnnForwardWhole(ctx, block, out, lse);
#endif
  ArenaScope scope(ctx.scratch);
  if constexpr (kBf16<T>) {
    if (UseHopper(ctx, block, Pass::kForward)) {
      const CudaAttentionBlock<CudaType<T>> cuda_block = CudaBlockOf<T>(block);
      void* workspace = Workspace(ctx, HopperAttentionForwardWorkspaceBytes(cuda_block));
      return CudaStatus("attention forward, hopper",
                        HopperAttentionForwardWhole(cuda_block, CudaHeadsOf<T>(out), CudaData<float>(lse),
                                                    workspace, ctx.stream()));
    }
  }
  const AttentionPartial partial{kBf16<T> ? ScratchLike(ctx, DType::kF32, out) : out, lse};
  ANNULUS_RETURN_IF_ERROR(ResetPartial(device, ctx, partial));
  return LaunchForward<T>(ctx, block, partial, kBf16<T> ? out : HeadsRef{});
}

absl::Status AttentionForwardArriving(CudaTag, Context& ctx, const ArrivingAttention& attention, HeadsRef out,
                                      TensorRef lse) {
  ANNULUS_RETURN_IF_ERROR(CheckSupported<BFloat16>(attention.block, {{"attention.out", out}}));
  std::vector<HopperArenaChunk> chunks;
  for (const KeyPart& part : attention.parts) {
    chunks.push_back({.first_row = part.rows.begin,
                      .rows = part.rows.size(),
                      .key_offset = part.positions.offset,
                      .key_stride = part.positions.stride,
                      .arrived = part.arrived,
                      .awaited = part.awaited});
  }
  const HopperAttentionArena arena{.block = CudaBlockOf<BFloat16>(attention.block),
                                   .chunks = chunks,
                                   .patience_ms = attention.patience_ms,
                                   .report = attention.report};
  ArenaScope scope(ctx.scratch);
  const HopperAttentionPartial partial{.out = CudaHeadsOf<float>(ScratchLike(ctx, DType::kF32, out)),
                                       .lse = CudaData<float>(lse),
                                       .result = CudaHeadsOf<BFloat16>(out)};
  void* workspace = Workspace(ctx, HopperAttentionForwardArenaWorkspaceBytes(arena));
  return CudaStatus("attention forward on arriving keys, hopper",
                    HopperAttentionForwardArena(arena, partial, workspace, ctx.stream()));
}

template <typename T>
absl::Status AttentionDelta(CudaTag, Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta) {
  const CudaAttentionDeltaArgs<CudaType<T>> args{.rows = out.rows,
                                                 .batch = out.batch,
                                                 .heads = out.heads,
                                                 .v_dim = out.dim,
                                                 .out = CudaHeadsOf<T>(out),
                                                 .dout = CudaHeadsOf<T>(dout),
                                                 .delta = delta.data<float>()};
  return CudaStatus("attention delta", CudaAttentionDelta(args, ctx.stream()));
}

template <typename T>
absl::Status AttentionBackward(CudaTag, Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckSupported<T>(block, gradients));
#if ANNULUS_HAS_CUDNN
  if (UseCudnn(ctx, block, Pass::kBackward)) return CudnnBackward(ctx, block, gradients);
#endif
  if (gradients.kv_write == Write::kOverwrite) {
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, gradients.dk));
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, gradients.dv));
  }
  if (NoPairs(block)) return absl::OkStatus();
  return LaunchBackward<T>(ctx, block, gradients);
}

template <typename T>
absl::Status AttentionBackwardWhole(CudaTag, Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckSupported<T>(block, gradients));
#if ANNULUS_HAS_CUDNN
  if (UseCudnn(ctx, block, Pass::kBackward)) return CudnnBackwardWhole(ctx, block, gradients);
#endif
  ArenaScope scope(ctx.scratch);
  AttentionGradients sums = gradients;
  for (HeadsRef* x : {&sums.dq, &sums.dk, &sums.dv}) {
    if constexpr (kBf16<T>) *x = ScratchLike(ctx, DType::kF32, *x);
    ANNULUS_RETURN_IF_ERROR(Zero(ctx, *x));
  }
  ANNULUS_RETURN_IF_ERROR(LaunchBackward<T>(ctx, block, sums));
  if constexpr (kBf16<T>) {
    const std::pair<HeadsRef, HeadsRef> rounded[] = {
        {sums.dq, gradients.dq}, {sums.dk, gradients.dk}, {sums.dv, gradients.dv}};
    for (const auto& [from, to] : rounded) {
      const StridedRows<const float> x = StridedOf<float>(ConstHeadsRef(from));
      ANNULUS_RETURN_IF_ERROR(
          CudaStatus("attention: rounding of gradients",
                     CudaCastRows<float, __nv_bfloat16>(RowsOf(from), x, StridedOf<T>(to), ctx.stream())));
    }
  }
  return absl::OkStatus();
}

#define ANNULUS_INSTANTIATE(T)                                                                         \
  template absl::Status MergePartials<T>(CudaTag, Context&, const PartialMerge&);                      \
  template absl::Status AttentionForward<T>(CudaTag, Context&, const AttentionBlock&,                  \
                                            const AttentionPartial&);                                  \
  template absl::Status AttentionForwardWhole<T>(CudaTag, Context&, const AttentionBlock&, HeadsRef,   \
                                                 TensorRef);                                           \
  template absl::Status AttentionDelta<T>(CudaTag, Context&, ConstHeadsRef, ConstHeadsRef, TensorRef); \
  template absl::Status AttentionBackward<T>(CudaTag, Context&, const AttentionBlock&,                 \
                                             const AttentionGradients&);                               \
  template absl::Status AttentionBackwardWhole<T>(CudaTag, Context&, const AttentionBlock&,            \
                                                  const AttentionGradients&);
ANNULUS_INSTANTIATE(float)
ANNULUS_INSTANTIATE(BFloat16)
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
