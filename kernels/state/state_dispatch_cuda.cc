#include <cmath>

#include "kernels/common/cuda_call.h"
#include "kernels/state/state_cuda.h"
#include "kernels/state/state_kernels.h"

namespace annulus::kernels {
namespace {

const float* DataOrNull(const ConstTensorRef& x) { return x.defined() ? x.data<float>() : nullptr; }

absl::Status Status(cudaError_t error, absl::string_view call, int64_t k) {
  if (error != cudaErrorInvalidValue) return CudaStatus(call, error);
  return Invalid(call, ": k=", k, ": expected at most ", kMaxStateRows);
}

}  // namespace

absl::Status AdvanceState(CudaTag, Context& ctx, ConstTensorRef transition, Transpose transpose,
                          ConstTensorRef in, ConstTensorRef state, TensorRef out) {
  const int64_t count = state.dim(0) * state.dim(1), k = state.dim(2), v = state.dim(3);
  if (transition.rank() == 2 || !in.defined()) {
    return CudaStatus("advance state", CudaScaleStates(count, k * v, transition.data<float>(), DataOrNull(in),
                                                       state.data<float>(), out.data<float>(), ctx.stream()));
  }
  const CudaAdvanceStatesArgs args{
      .count = count,
      .k = k,
      .v = v,
      .form = transpose == Transpose::kYes ? MatrixForm::kTransposed : MatrixForm::kPlain,
      .matrix = transition.data<float>(),
      .in = in.data<float>(),
      .state = state.data<float>(),
      .out = out.data<float>()};
  return Status(CudaAdvanceStates(args, ctx.stream()), "advance state", k);
}

absl::Status ComposeTransitions(CudaTag, Context& ctx, ConstTensorRef later, ConstTensorRef earlier,
                                TensorRef out) {
  const int64_t count = out.dim(0) * out.dim(1);
  // Of factors each is a matrix of one element.
  const int64_t k = out.rank() == 2 ? 1 : std::llround(std::sqrt(static_cast<double>(out.dim(2))));
  const CudaAdvanceStatesArgs args{.count = count,
                                   .k = k,
                                   .v = k,
                                   .matrix = later.data<float>(),
                                   .in = earlier.data<float>(),
                                   .out = out.data<float>()};
  return Status(CudaAdvanceStates(args, ctx.stream()), "compose transitions", k);
}

}  // namespace annulus::kernels
