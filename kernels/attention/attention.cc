#include <limits>

#include "annulus/ops/attention_arrival.h"
#include "kernels/attention/attention_kernels.h"
#include "kernels/common/arguments.h"

namespace annulus {
namespace {

using kernels::CheckHeads;
using kernels::CheckTensor;

// Row strides become leading dimensions of BLAS, which counts in 32 bits.
constexpr int64_t kMaxStride = std::numeric_limits<int32_t>::max();

// `x` must be a well-formed [rows, batch, heads, dim] of the dtype.
struct ExpectedHeads {
  DType dtype = DType::kF32;
  int64_t rows = 0, batch = 0, heads = 0, dim = 0;
};

absl::Status CheckHeadsAre(absl::string_view name, const ConstHeadsRef& x, const ExpectedHeads& expected) {
  ANNULUS_RETURN_IF_ERROR(CheckHeads(name, x));
  if (x.dtype != expected.dtype || x.rows != expected.rows || x.batch != expected.batch ||
      x.heads != expected.heads || x.dim != expected.dim) {
    return Invalid(name, "=", Name(x.dtype), "[", x.rows, ", ", x.batch, ", ", x.heads, ", ", x.dim,
                   "]: expected ", Name(expected.dtype), "[", expected.rows, ", ", expected.batch, ", ",
                   expected.heads, ", ", expected.dim, "]");
  }
  if (x.row_stride > kMaxStride) {
    return Invalid(name, ".row_stride=", x.row_stride, ": expected at most ", kMaxStride, " elements");
  }
  return absl::OkStatus();
}

absl::Status CheckMask(const Context& ctx, const AttentionBlock& block) {
  const Shape tokens = {block.q.rows * block.q.batch};
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.bounds.lo", block.bounds.lo, DType::kI64, tokens));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.bounds.hi", block.bounds.hi, DType::kI64, tokens));
  if (block.mask_shape == MaskShape::kCausal && block.q.rows != block.k.rows) {
    return Invalid("attention.mask_shape=causal with ", block.q.rows, " query and ", block.k.rows,
                   " key rows: expected as many of both");
  }
  if (block.key_positions.offset < 0 || block.key_positions.stride < 1) {
    return Invalid("attention.key_positions: offset=", block.key_positions.offset,
                   ", stride=", block.key_positions.stride, ": expected offset >= 0 and stride >= 1");
  }
  return absl::OkStatus();
}

absl::Status CheckBlock(const Context& ctx, const AttentionBlock& block) {
  const ConstHeadsRef &q = block.q, &k = block.k, &v = block.v;
  ANNULUS_RETURN_IF_ERROR(CheckHeads(ctx, "attention.q", q));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.q", q, {q.dtype, q.rows, q.batch, q.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.k", k, {q.dtype, k.rows, q.batch, k.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.v", v, {q.dtype, k.rows, q.batch, k.heads, v.dim}));
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0) {
    return Invalid("attention.heads=", q.heads, ": expected a multiple of the ", k.heads, " KV heads");
  }
  ANNULUS_RETURN_IF_ERROR(CheckAttentionChoice(kernels::KernelCaseOf(ctx, block, Pass::kForward)));
  return CheckMask(ctx, block);
}

Shape StatShape(const ConstHeadsRef& q) { return {q.rows, q.batch, q.heads}; }

// `out` and `lse` of the block's queries.
absl::Status CheckOutput(const Context& ctx, const AttentionBlock& block, DType dtype,
                         const ConstHeadsRef& out, const ConstTensorRef& lse) {
  const ConstHeadsRef& q = block.q;
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.out", out, {dtype, q.rows, q.batch, q.heads, block.v.dim}));
  return CheckTensor(ctx, "attention.lse", lse, AccumOf(q.dtype), StatShape(q));
}

// dtype: of dq, dk and dv
absl::Status CheckGradients(const Context& ctx, const AttentionBlock& block, const AttentionGradients& g,
                            DType dtype) {
  const ConstHeadsRef &q = block.q, &k = block.k, &v = block.v;
  if (g.out.data != nullptr || kernels::KernelFor(ctx, block, Pass::kBackward) == AttentionKernel::kCudnn) {
    ANNULUS_RETURN_IF_ERROR(
        CheckHeadsAre("attention.out", g.out, {q.dtype, q.rows, q.batch, q.heads, v.dim}));
  }
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.lse", g.lse, AccumOf(q.dtype), StatShape(q)));
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.dout", g.dout, {q.dtype, q.rows, q.batch, q.heads, v.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.delta", g.delta, AccumOf(q.dtype), StatShape(q)));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.dq", g.dq, {dtype, q.rows, q.batch, q.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.dk", g.dk, {dtype, k.rows, k.batch, k.heads, k.dim}));
  return CheckHeadsAre("attention.dv", g.dv, {dtype, v.rows, v.batch, v.heads, v.dim});
}

absl::Status CheckSum(const Context& ctx, const AttentionPartial& partial) {
  if (ctx.device.kind != DeviceKind::kCpu) return Invalid("attention.sum: expected none but on CPUs");
  return CheckTensor(ctx, "attention.sum", partial.sum, partial.lse.dtype(), partial.lse.shape());
}

absl::Status CheckPartial(const Context& ctx, const AttentionPartial& partial) {
  const ConstHeadsRef out = partial.out;
  ANNULUS_RETURN_IF_ERROR(CheckHeads(ctx, "attention.out", out));
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.out", out, {AccumOf(out.dtype), out.rows, out.batch, out.heads, out.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.lse", partial.lse, out.dtype, StatShape(out)));
  return partial.has_sum() ? CheckSum(ctx, partial) : absl::OkStatus();
}

}  // namespace

absl::Status ResetPartial(Context& ctx, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckPartial(ctx, partial));
  return VisitDevice(ctx, [&](auto device) { return kernels::ResetPartial(device, ctx, partial); });
}

absl::Status FinishPartial(Context& ctx, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckPartial(ctx, partial));
  ANNULUS_RETURN_IF_ERROR(CheckSum(ctx, partial));
  return kernels::FinishPartial(CpuTag{}, ctx, partial);
}

absl::Status MergePartials(Context& ctx, const PartialMerge& m) {
  const DType accum = AccumOf(m.out.dtype);
  ANNULUS_RETURN_IF_ERROR(CheckHeads(ctx, "merge.out", m.out));
  const auto expected = [&](int64_t dim) {
    return ExpectedHeads{accum, m.out.rows, m.out.batch, m.out.heads, dim};
  };
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("merge.lse", m.lse, expected(1)));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("merge.into_out", m.into_out, expected(m.out.dim)));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("merge.into_lse", m.into_lse, expected(1)));
  if (m.has_sums()) {
    if (ctx.device.kind != DeviceKind::kCpu) return Invalid("merge.sum: expected none but on CPUs");
    ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("merge.sum", m.sum, expected(1)));
    ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("merge.into_sum", m.into_sum, expected(1)));
  }
  return VisitKernel(ctx, m.out.dtype,
                     [&]<class T>(auto device) { return kernels::MergePartials<T>(device, ctx, m); });
}

absl::Status AttentionForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(ctx, block));
  ANNULUS_RETURN_IF_ERROR(CheckOutput(ctx, block, AccumOf(block.q.dtype), partial.out, partial.lse));
  if (partial.has_sum()) ANNULUS_RETURN_IF_ERROR(CheckSum(ctx, partial));
  return VisitKernel(ctx, block.q.dtype, [&]<class T>(auto device) {
    return kernels::AttentionForward<T>(device, ctx, block, partial);
  });
}

absl::Status AttentionForwardWhole(Context& ctx, const AttentionBlock& block, HeadsRef out, TensorRef lse) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(ctx, block));
  ANNULUS_RETURN_IF_ERROR(CheckOutput(ctx, block, block.q.dtype, out, lse));
  return VisitKernel(ctx, block.q.dtype, [&]<class T>(auto device) {
    return kernels::AttentionForwardWhole<T>(device, ctx, block, out, lse);
  });
}

absl::Status AttentionForwardArriving(Context& ctx, const ArrivingAttention& attention, HeadsRef out,
                                      TensorRef lse) {
  const AttentionBlock& block = attention.block;
  ANNULUS_RETURN_IF_ERROR(CheckBlock(ctx, block));
  ANNULUS_RETURN_IF_ERROR(CheckOutput(ctx, block, block.q.dtype, out, lse));
  if (attention.parts.size() > kMaxKeyParts)
    return Invalid("attention.parts: ", attention.parts.size(), ": expected at most ", kMaxKeyParts);
#if ANNULUS_HAS_CUDA
  if (TakesArrivals(kernels::KernelCaseOf(ctx, block, Pass::kForward)))
    return kernels::AttentionForwardArriving(CudaTag{}, ctx, attention, out, lse);
#endif
  return Invalid(
      "attention: no kernel takes keys as they come: expected bf16 on Hopper, deterministic: false");
}

absl::Status AttentionDelta(Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta) {
  ANNULUS_RETURN_IF_ERROR(CheckHeads(ctx, "attention.out", out));
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.dout", dout, {out.dtype, out.rows, out.batch, out.heads, out.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.delta", delta, AccumOf(out.dtype), StatShape(out)));
  return VisitKernel(ctx, out.dtype, [&]<class T>(auto device) {
    return kernels::AttentionDelta<T>(device, ctx, out, dout, delta);
  });
}

absl::Status AttentionBackward(Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(ctx, block));
  ANNULUS_RETURN_IF_ERROR(CheckGradients(ctx, block, gradients, AccumOf(block.q.dtype)));
  return VisitKernel(ctx, block.q.dtype, [&]<class T>(auto device) {
    return kernels::AttentionBackward<T>(device, ctx, block, gradients);
  });
}

absl::Status AttentionBackwardWhole(Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(ctx, block));
  ANNULUS_RETURN_IF_ERROR(CheckGradients(ctx, block, gradients, block.q.dtype));
  return VisitKernel(ctx, block.q.dtype, [&]<class T>(auto device) {
    return kernels::AttentionBackwardWhole<T>(device, ctx, block, gradients);
  });
}

}  // namespace annulus
