#include "kernels/common/recurrent_cuda.h"
#include "kernels/ssd/ssd_cuda.h"
#include "kernels/ssd/ssd_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
absl::StatusOr<CudaSsd<CudaType<T>>> ArgsOf(const Ssd& ssd) {
  ANNULUS_ASSIGN_OR_RETURN(const SegmentTable chunks,
                           MakeSegmentTable("ssd.segments", ssd.segments, ssd.chunk));
  return CudaSsd<CudaType<T>>{.rows = ssd.x.rows,
                              .batch = ssd.x.batch,
                              .heads = ssd.x.heads,
                              .groups = ssd.b.heads,
                              .dim = ssd.x.dim,
                              .state = ssd.b.dim,
                              .chunks = chunks,
                              .x = HeadRows<T>(ssd.x),
                              .b = HeadRows<T>(ssd.b),
                              .c = HeadRows<T>(ssd.c),
                              .dt = CudaDataOrNull<float>(ssd.dt),
                              .a = CudaData<float>(ssd.a),
                              .skip = CudaDataOrNull<float>(ssd.skip),
                              .ages = CudaData<int32_t>(ssd.ages)};
}

CudaSsdStates StatesOf(const TensorRef& states, const TensorRef& decays) {
  return {CudaData<float>(states), CudaData<float>(decays)};
}
CudaSsdSummary SummaryOf(const SegmentSummary& summary) {
  return {CudaData<float>(summary.transition), CudaData<float>(summary.state)};
}

template <typename U>
void* Scratch(Context& ctx, const CudaSsd<U>& ssd) {
  return ctx.scratch.Allocate(DType::kU8, {PlainSsdScratchBytes(ssd)}).raw();
}

}  // namespace

template <typename T>
absl::Status SsdChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  ArenaScope scope(ctx.scratch);
  return CudaStatus("ssd chunk states",
                    PlainSsdChunkStates(args, StatesOf(states.states, states.decays), SummaryOf(summary),
                                        Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status SsdForward(CudaTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial,
                        const SsdStates& states, HeadsRef y) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  ArenaScope scope(ctx.scratch);
  return CudaStatus("ssd forward", PlainSsdForward(args, CudaDataOrNull<float>(initial),
                                                   StatesOf(states.states, states.decays), HeadRows<T>(y),
                                                   Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status SsdBackwardChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  ArenaScope scope(ctx.scratch);
  return CudaStatus(
      "ssd backward chunk states",
      PlainSsdBackwardChunkStates(args, HeadRows<T>(in.dy), StatesOf(in.gradients, in.states.decays),
                                  SummaryOf(summary), Scratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status SsdBackward(CudaTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         ConstTensorRef final_gradient, const SsdGradients& out) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  ArenaScope scope(ctx.scratch);
  const CudaSsdGradients<CudaType<T>> to{.dy = HeadRows<T>(in.dy),
                                         .dx = HeadRows<T>(out.dx),
                                         .db = HeadRows<T>(out.db),
                                         .dc = HeadRows<T>(out.dc),
                                         .final_gradient = CudaDataOrNull<float>(final_gradient),
                                         .ddt = ssd.dt.defined() ? CudaData<float>(out.ddt) : nullptr,
                                         .da = CudaData<float>(out.da),
                                         .dskip = ssd.skip.defined() ? CudaData<float>(out.dskip) : nullptr};
  return CudaStatus("ssd backward",
                    PlainSsdBackward(args, StatesOf(in.states.states, in.states.decays),
                                     CudaData<float>(in.gradients), to, Scratch(ctx, args), ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                             \
  template absl::Status SsdChunkStates<T>(CudaTag, Context&, const Ssd&, const SsdStates&,                 \
                                          const SegmentSummary&);                                          \
  template absl::Status SsdForward<T>(CudaTag, Context&, const Ssd&, ConstTensorRef, const SsdStates&,     \
                                      HeadsRef);                                                           \
  template absl::Status SsdBackwardChunkStates<T>(CudaTag, Context&, const Ssd&, const SsdBackwardStates&, \
                                                  const SegmentSummary&);                                  \
  template absl::Status SsdBackward<T>(CudaTag, Context&, const Ssd&, const SsdBackwardStates&,            \
                                       ConstTensorRef, const SsdGradients&)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
