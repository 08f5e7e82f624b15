#include "kernels/common/recurrent_cuda.h"
#include "kernels/delta_rule/delta_rule_cuda.h"
#include "kernels/delta_rule/delta_rule_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
absl::StatusOr<CudaSsd<CudaType<T>>> ArgsOf(const DeltaRule& rule) {
  if (rule.chunk > kMaxDeltaChunk) {
    return Invalid("delta_rule.chunk=", rule.chunk, ": expected at most ", kMaxDeltaChunk, " on GPUs");
  }
  if (rule.k.dim > kMaxDeltaKeyDim) {
    return Invalid("delta_rule.k.dim=", rule.k.dim, ": expected at most ", kMaxDeltaKeyDim, " on GPUs");
  }
  ANNULUS_ASSIGN_OR_RETURN(const SegmentTable chunks,
                           MakeSegmentTable("delta_rule.segments", rule.segments, rule.chunk));
  return CudaSsd<CudaType<T>>{.rows = rule.k.rows,
                              .batch = rule.k.batch,
                              .heads = rule.k.heads,
                              .groups = rule.k.heads,
                              .dim = rule.v.dim,
                              .state = rule.k.dim,
                              .chunks = chunks,
                              .x = HeadRows<T>(rule.v),
                              .b = HeadRows<T>(rule.k),
                              .c = HeadRows<T>(rule.q),
                              .dt = CudaData<float>(rule.beta),
                              .a = CudaData<float>(rule.a),
                              .ages = CudaData<int32_t>(rule.ages)};
}

CudaSsdSummary SummaryOf(const SegmentSummary& summary) {
  return {CudaData<float>(summary.transition), CudaData<float>(summary.state)};
}

template <typename U>
void* Scratch(Context& ctx, const CudaSsd<U>& rule) {
  return ctx.scratch.Allocate(DType::kU8, {CudaDeltaScratchBytes(rule)}).raw();
}

}  // namespace

template <typename T>
absl::Status DeltaSummary(CudaTag, Context& ctx, const DeltaRule& rule, const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(rule));
  ArenaScope scope(ctx.scratch);
  return CudaStatus("delta_rule summary",
                    CudaDeltaSummary(args, SummaryOf(summary), Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status DeltaForward(CudaTag, Context& ctx, const DeltaRule& rule, ConstTensorRef initial,
                          TensorRef states, HeadsRef o) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(rule));
  ArenaScope scope(ctx.scratch);
  return CudaStatus("delta_rule forward",
                    CudaDeltaForward(args, CudaDataOrNull<float>(initial), CudaData<float>(states),
                                     HeadRows<T>(o), Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status DeltaBackwardSummary(CudaTag, Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(rule));
  ArenaScope scope(ctx.scratch);
  return CudaStatus(
      "delta_rule backward summary",
      CudaDeltaBackwardSummary(args, HeadRows<T>(do_), SummaryOf(summary), Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status DeltaBackward(CudaTag, Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in,
                           const DeltaGradients& out) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(rule));
  ArenaScope scope(ctx.scratch);
  const CudaDeltaGradients<CudaType<T>> to{.dout = HeadRows<T>(in.do_),
                                           .states = CudaData<float>(in.states),
                                           .final_gradient = CudaDataOrNull<float>(in.final_gradient),
                                           .dq = HeadRows<T>(out.dq),
                                           .dk = HeadRows<T>(out.dk),
                                           .dv = HeadRows<T>(out.dv),
                                           .dbeta = CudaData<float>(out.dbeta),
                                           .da = CudaData<float>(out.da)};
  return CudaStatus("delta_rule backward", CudaDeltaBackward(args, to, Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status L2NormForward(CudaTag, Context& ctx, ConstHeadsRef x, double eps, HeadsRef y) {
  return CudaStatus("l2_norm forward",
                    CudaL2NormForward(ShapeOf(x), x.dim, HeadRows<T>(x), static_cast<float>(eps),
                                      HeadRows<T>(y), ctx.stream()));
}

template <typename T>
absl::Status L2NormBackward(CudaTag, Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy,
                            HeadsRef dx) {
  return CudaStatus("l2_norm backward",
                    CudaL2NormBackward(ShapeOf(x), x.dim, HeadRows<T>(x), static_cast<float>(eps),
                                       HeadRows<T>(dy), HeadRows<T>(dx), ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                            \
  template absl::Status DeltaSummary<T>(CudaTag, Context&, const DeltaRule&, const SegmentSummary&);      \
  template absl::Status DeltaForward<T>(CudaTag, Context&, const DeltaRule&, ConstTensorRef, TensorRef,   \
                                        HeadsRef);                                                        \
  template absl::Status DeltaBackwardSummary<T>(CudaTag, Context&, const DeltaRule&, ConstHeadsRef,       \
                                                const SegmentSummary&);                                   \
  template absl::Status DeltaBackward<T>(CudaTag, Context&, const DeltaRule&, const DeltaBackwardInputs&, \
                                         const DeltaGradients&);                                          \
  template absl::Status L2NormForward<T>(CudaTag, Context&, ConstHeadsRef, double, HeadsRef);             \
  template absl::Status L2NormBackward<T>(CudaTag, Context&, ConstHeadsRef, double, ConstHeadsRef, HeadsRef)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
