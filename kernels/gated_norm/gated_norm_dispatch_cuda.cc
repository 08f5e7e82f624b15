#include "kernels/common/recurrent_cuda.h"
#include "kernels/gated_norm/gated_norm_cuda.h"
#include "kernels/gated_norm/gated_norm_kernels.h"

namespace annulus::kernels {
namespace {

CudaGate GateOf(Gate kind) {
  switch (kind) {
    case Gate::kSiluBefore:
      return CudaGate::kSiluBefore;
    case Gate::kSiluAfter:
      return CudaGate::kSiluAfter;
    case Gate::kSigmoidAfter:
      return CudaGate::kSigmoidAfter;
  }
  ANNULUS_CHECK(false) << "gate " << static_cast<int>(kind);
  return CudaGate::kSiluBefore;
}

template <typename T>
CudaGatedNormArgs<CudaType<T>> ArgsOf(const GatedNorm& norm) {
  const int64_t columns = norm.x.cols / norm.groups;
  return {.tokens = norm.x.rows,
          .groups = norm.groups,
          .columns = columns,
          .group_columns = norm.group_columns,
          .weight_step = norm.w.dim(0) == norm.x.cols ? columns : 0,
          .eps = norm.eps,
          .gate_kind = GateOf(norm.kind),
          .x = CudaData<T>(norm.x),
          .gate = CudaData<T>(norm.gate),
          .w = CudaData<T>(norm.w),
          .x_stride = norm.x.stride,
          .gate_stride = norm.gate.stride};
}

// The launchers refuse groups that do not fit in the registers of a CTA.
absl::Status Status(cudaError_t error, absl::string_view what, const GatedNorm& norm) {
  if (error != cudaErrorInvalidValue) return CudaStatus(what, error);
  return Invalid(
      "gated_norm.x: ", norm.groups, " groups of ", norm.x.cols / norm.groups,
      " columns on a GPU: expected at most 64 KiB a group forward and 32 KiB backward, or 4096 and "
      "2048 elements where rows are not whole multiples of 16 bytes");
}

// launch(args): in one pass, or in two around the sum over ranks.
template <typename T, typename Launch>
absl::Status InPasses(Context& ctx, const GatedNorm& norm, int64_t kinds, absl::string_view what,
                      const Launch& launch) {
  CudaGatedNormArgs<CudaType<T>> args = ArgsOf<T>(norm);
  if (!norm.sum_over_ranks) return Status(launch(args), what, norm);
  const TensorRef sums = ctx.scratch.Allocate(DType::kF32, {norm.x.rows, kinds * norm.groups});
  args.sums = CudaData<float>(sums);
  args.pass = NormPass::kSums;
  ANNULUS_RETURN_IF_ERROR(Status(launch(args), what, norm));
  ANNULUS_RETURN_IF_ERROR(norm.sum_over_ranks(sums));
  args.pass = NormPass::kFinish;
  return Status(launch(args), what, norm);
}

}  // namespace

template <typename T>
absl::Status GatedNormForward(CudaTag, Context& ctx, const GatedNorm& norm, MatrixRef y) {
  ArenaScope scope(ctx.scratch);
  return InPasses<T>(ctx, norm, 1, "gated_norm forward", [&](const auto& args) {
    return CudaGatedNormForward(args, CudaData<T>(y), y.stride, ctx.stream());
  });
}

template <typename T>
absl::Status GatedNormBackward(CudaTag, Context& ctx, const GatedNorm& norm,
                               const GatedNormGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  const int64_t scratch = CudaGatedNormScratch(norm.groups, norm.x.cols / norm.groups);
  const CudaGatedNormGradients<CudaType<T>> to{
      .dy = CudaData<T>(gradients.dy),
      .dx = CudaData<T>(gradients.dx),
      .dgate = CudaData<T>(gradients.dgate),
      .dy_stride = gradients.dy.stride,
      .dx_stride = gradients.dx.stride,
      .dgate_stride = gradients.dgate.stride,
      .dw = CudaData<float>(gradients.dw),
      .scratch = CudaData<float>(ctx.scratch.Allocate(DType::kF32, {scratch}))};
  return InPasses<T>(ctx, norm, 2, "gated_norm backward",
                     [&](const auto& args) { return CudaGatedNormBackward(args, to, ctx.stream()); });
}

#define ANNULUS_INSTANTIATE(T)                                                               \
  template absl::Status GatedNormForward<T>(CudaTag, Context&, const GatedNorm&, MatrixRef); \
  template absl::Status GatedNormBackward<T>(CudaTag, Context&, const GatedNorm&, const GatedNormGradients&)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
