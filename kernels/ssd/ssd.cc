#include "annulus/ops/ssd.h"

#include "kernels/common/arguments.h"
#include "kernels/common/segments.h"
#include "kernels/ssd/ssd_kernels.h"

namespace annulus {
namespace {

absl::Status CheckGroups(const Context& ctx, const Ssd& ssd) {
  const ConstHeadsRef &x = ssd.x, &b = ssd.b;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "ssd.b", b));
  if (b.heads < 1 || x.heads % b.heads != 0) {
    return Invalid("ssd.b.heads=", b.heads, ": expected a divisor of ", x.heads, " heads");
  }
  ConstHeadsRef expected = x;
  expected.heads = b.heads;
  expected.dim = b.dim;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.b", b, expected));
  return kernels::CheckHeadsAs("ssd.c", ssd.c, expected);
}

absl::Status CheckSsd(const Context& ctx, const Ssd& ssd) {
  const ConstHeadsRef& x = ssd.x;
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "ssd.x", x));
  ANNULUS_RETURN_IF_ERROR(CheckGroups(ctx, ssd));
  const DType accum = AccumOf(x.dtype);
  const Shape gates{x.rows, x.batch, x.heads};
  if (ssd.dt.defined()) ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "ssd.dt", ssd.dt, accum, gates));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "ssd.a", ssd.a, accum, gates));
  if (ssd.skip.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "ssd.skip", ssd.skip, accum, Shape{x.heads}));
  }
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "ssd.ages", ssd.ages, DType::kI32, Shape{x.rows, x.batch}));
  if (ssd.chunk < 1) return Invalid("ssd.chunk=", ssd.chunk, ": expected at least 1");
  return kernels::CheckSegments("ssd.segments", ssd.segments, x.rows);
}

int64_t Segments(const Ssd& ssd) { return static_cast<int64_t>(ssd.segments.size()); }

// [count, batch * heads, state, head_dim] of the accumulator dtype
absl::Status CheckStates(const Context& ctx, absl::string_view name, const Ssd& ssd, int64_t count,
                         const ConstTensorRef& states) {
  return kernels::CheckTensor(ctx, name, states, AccumOf(ssd.x.dtype),
                              Shape{count, ssd.x.batch * ssd.x.heads, ssd.b.dim, ssd.x.dim});
}

// [count, batch * heads]
absl::Status CheckDecays(const Context& ctx, absl::string_view name, const Ssd& ssd, int64_t count,
                         const ConstTensorRef& decays) {
  return kernels::CheckTensor(ctx, name, decays, AccumOf(ssd.x.dtype),
                              Shape{count, ssd.x.batch * ssd.x.heads});
}

absl::Status CheckChunkStates(const Context& ctx, const Ssd& ssd, const SsdStates& states) {
  ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "ssd.states", ssd, SsdChunks(ssd), states.states));
  return CheckDecays(ctx, "ssd.decays", ssd, SsdChunks(ssd), states.decays);
}

absl::Status CheckSummary(const Context& ctx, const Ssd& ssd, const SegmentSummary& summary) {
  ANNULUS_RETURN_IF_ERROR(CheckDecays(ctx, "ssd.summary.transition", ssd, Segments(ssd), summary.transition));
  return CheckStates(ctx, "ssd.summary.state", ssd, Segments(ssd), summary.state);
}

absl::Status CheckGradients(const Context& ctx, const Ssd& ssd, const SsdGradients& out) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.dx", out.dx, ssd.x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.db", out.db, ssd.b));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.dc", out.dc, ssd.c));
  const DType accum = AccumOf(ssd.x.dtype);
  if (ssd.dt.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "ssd.ddt", out.ddt, accum, ssd.dt.shape()));
  }
  if (ssd.skip.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "ssd.dskip", out.dskip, accum, ssd.skip.shape()));
  }
  return kernels::CheckTensor(ctx, "ssd.da", out.da, accum, ssd.a.shape());
}

}  // namespace

int64_t SsdChunks(const Ssd& ssd) { return kernels::CountChunks(ssd.segments, ssd.chunk); }

absl::Status SsdChunkStates(Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary) {
  ANNULUS_RETURN_IF_ERROR(CheckSsd(ctx, ssd));
  ANNULUS_RETURN_IF_ERROR(CheckChunkStates(ctx, ssd, states));
  ANNULUS_RETURN_IF_ERROR(CheckSummary(ctx, ssd, summary));
  return VisitKernel(ctx, ssd.x.dtype, [&]<class T>(auto device) {
    return kernels::SsdChunkStates<T>(device, ctx, ssd, states, summary);
  });
}

absl::Status SsdForward(Context& ctx, const Ssd& ssd, ConstTensorRef initial, const SsdStates& states,
                        HeadsRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckSsd(ctx, ssd));
  if (initial.defined()) {
    ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "ssd.initial", ssd, Segments(ssd), initial));
  }
  ANNULUS_RETURN_IF_ERROR(CheckChunkStates(ctx, ssd, states));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.y", y, ssd.x));
  return VisitKernel(ctx, ssd.x.dtype, [&]<class T>(auto device) {
    return kernels::SsdForward<T>(device, ctx, ssd, initial, states, y);
  });
}

absl::Status SsdBackwardChunkStates(Context& ctx, const Ssd& ssd, ConstHeadsRef dy, const SsdStates& states,
                                    TensorRef gradients, const SegmentSummary& summary) {
  ANNULUS_RETURN_IF_ERROR(CheckSsd(ctx, ssd));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.dy", dy, ssd.x));
  ANNULUS_RETURN_IF_ERROR(CheckChunkStates(ctx, ssd, states));
  ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "ssd.gradients", ssd, SsdChunks(ssd), gradients));
  ANNULUS_RETURN_IF_ERROR(CheckSummary(ctx, ssd, summary));
  return VisitKernel(ctx, ssd.x.dtype, [&]<class T>(auto device) {
    return kernels::SsdBackwardChunkStates<T>(device, ctx, ssd,
                                              {.dy = dy, .states = states, .gradients = gradients}, summary);
  });
}

absl::Status SsdBackward(Context& ctx, const Ssd& ssd, ConstHeadsRef dy, const SsdStates& states,
                         TensorRef gradients, ConstTensorRef final_gradient, const SsdGradients& out) {
  ANNULUS_RETURN_IF_ERROR(CheckSsd(ctx, ssd));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("ssd.dy", dy, ssd.x));
  ANNULUS_RETURN_IF_ERROR(CheckChunkStates(ctx, ssd, states));
  ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "ssd.gradients", ssd, SsdChunks(ssd), gradients));
  if (final_gradient.defined()) {
    ANNULUS_RETURN_IF_ERROR(CheckStates(ctx, "ssd.final_gradient", ssd, Segments(ssd), final_gradient));
  }
  ANNULUS_RETURN_IF_ERROR(CheckGradients(ctx, ssd, out));
  return VisitKernel(ctx, ssd.x.dtype, [&]<class T>(auto device) {
    return kernels::SsdBackward<T>(device, ctx, ssd, {.dy = dy, .states = states, .gradients = gradients},
                                   final_gradient, out);
  });
}

}  // namespace annulus
