#include "annulus/ops/attention.h"

#include <limits>

#include "kernels/attention/attention_kernels.h"
#include "kernels/common/arguments.h"

namespace annulus {
namespace {

using kernels::CheckCount;
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

absl::Status CheckBlock(const AttentionBlock& block) {
  const ConstHeadsRef &q = block.q, &k = block.k, &v = block.v;
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.q", q, {q.dtype, q.rows, q.batch, q.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.k", k, {q.dtype, k.rows, q.batch, k.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.v", v, {q.dtype, k.rows, q.batch, k.heads, v.dim}));
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0) {
    return Invalid("attention.heads=", q.heads, ": expected a multiple of the ", k.heads, " KV heads");
  }
  const int64_t tokens = q.rows * q.batch;
  ANNULUS_RETURN_IF_ERROR(
      CheckCount("attention.bounds.lo.size", static_cast<int64_t>(block.bounds.lo.size()), tokens));
  ANNULUS_RETURN_IF_ERROR(
      CheckCount("attention.bounds.hi.size", static_cast<int64_t>(block.bounds.hi.size()), tokens));
  if (block.key_positions.offset < 0 || block.key_positions.stride < 1) {
    return Invalid("attention.key_positions: offset=", block.key_positions.offset,
                   ", stride=", block.key_positions.stride, ": expected offset >= 0 and stride >= 1");
  }
  return absl::OkStatus();
}

Shape StatShape(const ConstHeadsRef& q) { return {q.rows, q.batch, q.heads}; }

absl::Status CheckPartial(const Context& ctx, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckHeads("attention.out", partial.out));
  return CheckTensor(ctx, "attention.lse", partial.lse, partial.out.dtype, StatShape(partial.out));
}

absl::Status CheckGradients(const Context& ctx, const AttentionBlock& block, const AttentionGradients& g) {
  const ConstHeadsRef &q = block.q, &k = block.k, &v = block.v;
  const DType accum = AccumOf(q.dtype);
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.dout", g.dout, {q.dtype, q.rows, q.batch, q.heads, v.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.lse", g.lse, accum, StatShape(q)));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.delta", g.delta, accum, StatShape(q)));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.dq", g.dq, {accum, q.rows, q.batch, q.heads, q.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckHeadsAre("attention.dk", g.dk, {accum, k.rows, k.batch, k.heads, k.dim}));
  return CheckHeadsAre("attention.dv", g.dv, {accum, v.rows, v.batch, v.heads, v.dim});
}

}  // namespace

absl::Status ResetPartial(Context& ctx, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckPartial(ctx, partial));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(partial.out.dtype,
                      [&]<class T>() { return kernels::ResetPartial<T>(device, partial); });
  });
}

absl::Status AttentionForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(block));
  ANNULUS_RETURN_IF_ERROR(CheckPartial(ctx, partial));
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.out", partial.out,
                    {AccumOf(block.q.dtype), block.q.rows, block.q.batch, block.q.heads, block.v.dim}));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(block.q.dtype,
                      [&]<class T>() { return kernels::AttentionForward<T>(device, ctx, block, partial); });
  });
}

absl::Status AttentionDelta(Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta) {
  ANNULUS_RETURN_IF_ERROR(CheckHeads("attention.out", out));
  ANNULUS_RETURN_IF_ERROR(
      CheckHeadsAre("attention.dout", dout, {out.dtype, out.rows, out.batch, out.heads, out.dim}));
  ANNULUS_RETURN_IF_ERROR(CheckTensor(ctx, "attention.delta", delta, out.dtype, StatShape(out)));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(out.dtype,
                      [&]<class T>() { return kernels::AttentionDelta<T>(device, out, dout, delta); });
  });
}

absl::Status AttentionBackward(Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients) {
  ANNULUS_RETURN_IF_ERROR(CheckBlock(block));
  ANNULUS_RETURN_IF_ERROR(CheckGradients(ctx, block, gradients));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(block.q.dtype, [&]<class T>() {
      return kernels::AttentionBackward<T>(device, ctx, block, gradients);
    });
  });
}

}  // namespace annulus
