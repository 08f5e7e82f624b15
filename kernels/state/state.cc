#include "annulus/ops/state.h"

#include "kernels/common/arguments.h"
#include "kernels/state/state_kernels.h"

namespace annulus {
namespace {

// Side of a matrix with `elements` elements; -1: it is not square.
int64_t SquareSide(int64_t elements) {
  int64_t side = 0;
  while (side * side < elements) ++side;
  return side * side == elements ? side : -1;
}

}  // namespace

absl::Status AdvanceState(Context& ctx, ConstTensorRef transition, Transpose transpose, ConstTensorRef in,
                          ConstTensorRef state, TensorRef out) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "advance_state.state", state));
  const DType dtype = AccumOf(state.dtype());
  if (state.rank() != 4) {
    return Invalid("advance_state.state=", ToString(state.shape()),
                   ": expected [segments, batch * heads, K, V]");
  }
  const int64_t segments = state.dim(0), heads = state.dim(1), k = state.dim(2);
  const Shape expected = transition.rank() == 3 ? Shape{segments, heads, k * k} : Shape{segments, heads};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "advance_state.transition", transition, dtype, expected));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "advance_state.state", state, dtype, state.shape()));
  if (in.defined()) {
    ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "advance_state.in", in, dtype, state.shape()));
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "advance_state.out", out, dtype, state.shape()));
  return VisitDevice(ctx, [&](auto device) {
    return kernels::AdvanceState(device, ctx, transition, transpose, in, state, out);
  });
}

absl::Status ComposeTransitions(Context& ctx, ConstTensorRef later, ConstTensorRef earlier, TensorRef out) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "compose_transitions.later", later));
  const DType dtype = AccumOf(later.dtype());
  const bool matrices = later.rank() == 3 && SquareSide(later.dim(2)) >= 0;
  if (later.rank() != 2 && !matrices) {
    return Invalid("compose_transitions.later=", ToString(later.shape()),
                   ": expected [segments, batch * heads] or [segments, batch * heads, K * K]");
  }
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "compose_transitions.later", later, dtype, later.shape()));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "compose_transitions.earlier", earlier, dtype, later.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "compose_transitions.out", out, dtype, later.shape()));
  if (out.elements() > 0 && (out.raw() == later.raw() || out.raw() == earlier.raw())) {
    return Invalid("compose_transitions.out is one of the transitions: expected memory of its own");
  }
  return VisitDevice(
      ctx, [&](auto device) { return kernels::ComposeTransitions(device, ctx, later, earlier, out); });
}

}  // namespace annulus
