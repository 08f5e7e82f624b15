#include "kernels/common/recurrent_cuda.h"
#include "kernels/ssd/ssd_cuda.h"
#include "kernels/ssd/ssd_kernels.h"
#include "kernels/ssd/ssd_mma.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kUnitBytes = 16;  // of an access of the kernels for tensor cores

bool OnUnits(const void* p) { return reinterpret_cast<uintptr_t>(p) % kUnitBytes == 0; }
bool OnUnits(const ConstHeadsRef& x) {
  const int64_t unit = kUnitBytes / SizeOf(x.dtype);
  return OnUnits(x.data) && (x.rows <= 1 || x.row_stride % unit == 0) &&
         (x.batch <= 1 || x.batch_stride % unit == 0);
}

// Whether the kernels for tensor cores take the scan. The four calls of a scan must agree, for these keep
// states in a form of their own: what decides is known to all of them.
template <typename U>
bool OnTensorCores(const CudaSsd<U>& args, const TensorRef& states) {
  if constexpr (std::is_same_v<U, __nv_bfloat16>) return MmaSsdKnows(args) && OnUnits(states.raw());
  return false;
}

// x itself, or a copy in scratch memory that lies on units.
absl::StatusOr<ConstHeadsRef> InUnits(Context& ctx, const ConstHeadsRef& x) {
  if (OnUnits(x)) return x;
  const HeadsRef copy =
      HeadsOf(ctx.scratch.Allocate(x.dtype, {x.rows, x.batch, x.heads * x.dim}), 0, x.heads, x.dim);
  const RowsShape shape{.rows = x.rows, .batch = x.batch, .columns = x.heads * x.dim};
  ANNULUS_RETURN_IF_ERROR(
      CudaStatus("ssd copy", CudaCastRows<__nv_bfloat16, __nv_bfloat16>(
                                 shape, HeadRows<BFloat16>(x), HeadRows<BFloat16>(copy), ctx.stream())));
  return ConstHeadsRef(copy);
}

// An output that lies on units: `to` itself or scratch memory, which Finish copies to it.
class OutputInUnits {
 public:
  OutputInUnits(Context& ctx, const HeadsRef& to) : to_(to), own_(to) {
    if (OnUnits(ConstHeadsRef(to))) return;
    own_ =
        HeadsOf(ctx.scratch.Allocate(to.dtype, {to.rows, to.batch, to.heads * to.dim}), 0, to.heads, to.dim);
  }
  StridedRows<__nv_bfloat16> rows() const { return HeadRows<BFloat16>(own_); }
  absl::Status Finish(Context& ctx) const {
    if (own_.data == to_.data) return absl::OkStatus();
    const RowsShape shape{.rows = to_.rows, .batch = to_.batch, .columns = to_.heads * to_.dim};
    return CudaStatus(
        "ssd copy", CudaCastRows<__nv_bfloat16, __nv_bfloat16>(shape, HeadRows<BFloat16>(ConstHeadsRef(own_)),
                                                               HeadRows<BFloat16>(to_), ctx.stream()));
  }

 private:
  HeadsRef to_, own_;
};

absl::Status CheckOnUnits(absl::string_view name, const TensorRef& states) {
  if (OnUnits(states.raw())) return absl::OkStatus();
  return Invalid(name, ": expected to lie on ", kUnitBytes, " bytes, as ssd.states does");
}

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
void* PlainScratch(Context& ctx, const CudaSsd<U>& ssd) {
  return ctx.scratch.Allocate(DType::kU8, {PlainSsdScratchBytes(ssd)}).raw();
}

// The scan with its inputs on units.
absl::StatusOr<CudaSsd<__nv_bfloat16>> MmaArgsOf(Context& ctx, Ssd ssd) {
  ANNULUS_ASSIGN_OR_RETURN(ssd.x, InUnits(ctx, ssd.x));
  ANNULUS_ASSIGN_OR_RETURN(ssd.b, InUnits(ctx, ssd.b));
  ANNULUS_ASSIGN_OR_RETURN(ssd.c, InUnits(ctx, ssd.c));
  return ArgsOf<BFloat16>(ssd);
}

absl::Status MmaForward(Context& ctx, const Ssd& ssd, const ConstTensorRef& initial, const SsdStates& states,
                        const HeadsRef& y) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, MmaArgsOf(ctx, ssd));
  const OutputInUnits to(ctx, y);
  ANNULUS_RETURN_IF_ERROR(CudaStatus(
      "ssd forward", MmaSsdForward(args, CudaDataOrNull<float>(initial),
                                   StatesOf(states.states, states.decays), to.rows(), ctx.stream())));
  return to.Finish(ctx);
}

absl::Status MmaBackward(Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         CudaSsdGradients<__nv_bfloat16> gates, const SsdGradients& out) {
  ANNULUS_RETURN_IF_ERROR(CheckOnUnits("ssd.gradients", in.gradients));
  ANNULUS_ASSIGN_OR_RETURN(const auto args, MmaArgsOf(ctx, ssd));
  ANNULUS_ASSIGN_OR_RETURN(const ConstHeadsRef dy, InUnits(ctx, in.dy));
  const OutputInUnits dx(ctx, out.dx), db(ctx, out.db), dc(ctx, out.dc);
  gates.dy = HeadRows<BFloat16>(dy);
  gates.dx = dx.rows(), gates.db = db.rows(), gates.dc = dc.rows();
  void* scratch = ctx.scratch.Allocate(DType::kU8, {MmaSsdBackwardScratchBytes(args)}).raw();
  ANNULUS_RETURN_IF_ERROR(CudaStatus(
      "ssd backward", MmaSsdBackward(args, StatesOf(in.states.states, in.states.decays),
                                     CudaData<float>(in.gradients), gates, scratch, ctx.stream())));
  ANNULUS_RETURN_IF_ERROR(dx.Finish(ctx));
  ANNULUS_RETURN_IF_ERROR(db.Finish(ctx));
  return dc.Finish(ctx);
}

}  // namespace

template <typename T>
absl::Status SsdChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  const CudaSsdStates to = StatesOf(states.states, states.decays);
  ArenaScope scope(ctx.scratch);
  if (OnTensorCores(args, states.states)) {
    ANNULUS_ASSIGN_OR_RETURN(const auto mma, MmaArgsOf(ctx, ssd));
    return CudaStatus("ssd chunk states", MmaSsdChunkStates(mma, to, SummaryOf(summary), ctx.stream()));
  }
  return CudaStatus("ssd chunk states",
                    PlainSsdChunkStates(args, to, SummaryOf(summary), PlainScratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status SsdForward(CudaTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial,
                        const SsdStates& states, HeadsRef y) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  ArenaScope scope(ctx.scratch);
  if (OnTensorCores(args, states.states)) return MmaForward(ctx, ssd, initial, states, y);
  return CudaStatus("ssd forward", PlainSsdForward(args, CudaDataOrNull<float>(initial),
                                                   StatesOf(states.states, states.decays), HeadRows<T>(y),
                                                   PlainScratch(ctx, args), ctx.stream()));
}

template <typename T>
absl::Status SsdBackwardChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary) {
  ANNULUS_ASSIGN_OR_RETURN(const auto args, ArgsOf<T>(ssd));
  const CudaSsdStates to = StatesOf(in.gradients, in.states.decays);
  ArenaScope scope(ctx.scratch);
  if (OnTensorCores(args, in.states.states)) {
    ANNULUS_RETURN_IF_ERROR(CheckOnUnits("ssd.gradients", in.gradients));
    ANNULUS_ASSIGN_OR_RETURN(const auto mma, MmaArgsOf(ctx, ssd));
    ANNULUS_ASSIGN_OR_RETURN(const ConstHeadsRef dy, InUnits(ctx, in.dy));
    return CudaStatus(
        "ssd backward chunk states",
        MmaSsdBackwardChunkStates(mma, HeadRows<BFloat16>(dy), to, SummaryOf(summary), ctx.stream()));
  }
  return CudaStatus("ssd backward chunk states",
                    PlainSsdBackwardChunkStates(args, HeadRows<T>(in.dy), to, SummaryOf(summary),
                                                PlainScratch(ctx, args), ctx.stream()));
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
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (OnTensorCores(args, in.states.states)) return MmaBackward(ctx, ssd, in, to, out);
  }
  return CudaStatus("ssd backward", PlainSsdBackward(args, StatesOf(in.states.states, in.states.decays),
                                                     CudaData<float>(in.gradients), to,
                                                     PlainScratch(ctx, args), ctx.stream()));
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
