#include "annulus/ops/delta_rule.h"

#include "kernels/common/arguments.h"
#include "kernels/common/segments.h"
#include "kernels/delta_rule/delta_rule_kernels.h"

namespace annulus {
namespace {

absl::Status CheckRule(const Context& ctx, const DeltaRule& rule) {
  const ConstHeadsRef& k = rule.k;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "delta_rule.k", k));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.q", rule.q, k));
  ConstHeadsRef values = k;
  values.dim = rule.v.dim;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.v", rule.v, values));
  const Shape gates{k.rows, k.batch, k.heads};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "delta_rule.beta", rule.beta, AccumOf(k.dtype), gates));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "delta_rule.a", rule.a, AccumOf(k.dtype), gates));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "delta_rule.ages", rule.ages, DType::kI32, Shape{k.rows, k.batch}));
  if (rule.chunk < 1) return Invalid("delta_rule.chunk=", rule.chunk, ": expected at least 1");
  return kernels::CheckSegments("delta_rule.segments", rule.segments, k.rows);
}

// [count, batch * heads, K, V] of the accumulator dtype
absl::Status CheckStates(const Context& ctx, absl::string_view name, const DeltaRule& rule, int64_t count,
                         const ConstTensorRef& states) {
  return kernels::CheckTensor(ctx, name, states, AccumOf(rule.k.dtype),
                              Shape{count, rule.k.batch * rule.k.heads, rule.k.dim, rule.v.dim});
}

int64_t Segments(const DeltaRule& rule) { return static_cast<int64_t>(rule.segments.size()); }

absl::Status CheckSummary(const Context& ctx, const DeltaRule& rule, const SegmentSummary& summary) {
  const Shape transitions{Segments(rule), rule.k.batch * rule.k.heads, rule.k.dim * rule.k.dim};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "delta_rule.summary.transition", summary.transition,
                                               AccumOf(rule.k.dtype), transitions));
  return CheckStates(ctx, "delta_rule.summary.state", rule, Segments(rule), summary.state);
}

absl::Status CheckEps(double eps) {
  if (!(eps >= 0)) return Invalid("l2_norm.eps=", eps, ": expected at least 0");
  return absl::OkStatus();
}

}  // namespace

int64_t DeltaChunks(const DeltaRule& rule) { return kernels::CountChunks(rule.segments, rule.chunk); }

absl::Status DeltaSummary(Context& ctx, const DeltaRule& rule, const SegmentSummary& summary) {
  ANNULUS_RETURN_IF_ERROR(CheckRule(ctx, rule));
  ANNULUS_RETURN_IF_ERROR(CheckSummary(ctx, rule, summary));
  return VisitKernel(ctx, rule.k.dtype, [&]<class T>(auto device) {
    return kernels::DeltaSummary<T>(device, ctx, rule, summary);
  });
}

absl::Status DeltaForward(Context& ctx, const DeltaRule& rule, ConstTensorRef initial, TensorRef states,
                          HeadsRef o) {
  ANNULUS_RETURN_IF_ERROR(CheckRule(ctx, rule));
  if (initial.defined()) {
    ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "delta_rule.initial", rule, Segments(rule), initial));
  }
  ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "delta_rule.states", rule, DeltaChunks(rule), states));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.o", o, rule.v));
  return VisitKernel(ctx, rule.k.dtype, [&]<class T>(auto device) {
    return kernels::DeltaForward<T>(device, ctx, rule, initial, states, o);
  });
}

absl::Status DeltaBackwardSummary(Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary) {
  ANNULUS_RETURN_IF_ERROR(CheckRule(ctx, rule));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.do", do_, rule.v));
  ANNULUS_RETURN_IF_ERROR(CheckSummary(ctx, rule, summary));
  return VisitKernel(ctx, rule.k.dtype, [&]<class T>(auto device) {
    return kernels::DeltaBackwardSummary<T>(device, ctx, rule, do_, summary);
  });
}

absl::Status DeltaBackward(Context& ctx, const DeltaRule& rule, ConstHeadsRef do_, ConstTensorRef states,
                           ConstTensorRef final_gradient, const DeltaGradients& out) {
  ANNULUS_RETURN_IF_ERROR(CheckRule(ctx, rule));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.do", do_, rule.v));
  ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "delta_rule.states", rule, DeltaChunks(rule), states));
  if (final_gradient.defined()) {
    ANNULUS_RETURN_IF_ERROR(
        CheckStates(ctx, "delta_rule.final_gradient", rule, Segments(rule), final_gradient));
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.dq", out.dq, rule.q));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.dk", out.dk, rule.k));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("delta_rule.dv", out.dv, rule.v));
  const DType accum = AccumOf(rule.k.dtype);
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "delta_rule.dbeta", out.dbeta, accum, rule.beta.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "delta_rule.da", out.da, accum, rule.a.shape()));
  return VisitKernel(ctx, rule.k.dtype, [&]<class T>(auto device) {
    return kernels::DeltaBackward<T>(device, ctx, rule,
                                     {.do_ = do_, .states = states, .final_gradient = final_gradient}, out);
  });
}

absl::Status L2NormForward(Context& ctx, ConstHeadsRef x, double eps, HeadsRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckEps(eps));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "l2_norm.x", x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("l2_norm.y", y, x));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::L2NormForward<T>(device, ctx, x, eps, y); });
}

absl::Status L2NormBackward(Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy, HeadsRef dx) {
  ANNULUS_RETURN_IF_ERROR(CheckEps(eps));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "l2_norm.x", x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("l2_norm.dy", dy, x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("l2_norm.dx", dx, x));
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::L2NormBackward<T>(device, ctx, x, eps, dy, dx);
  });
}

}  // namespace annulus
