#include <limits>

#include "kernels/common/recurrent_cuda.h"
#include "kernels/mamba_gates/mamba_gates_cuda.h"
#include "kernels/mamba_gates/mamba_gates_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
CudaMambaGatesArgs<CudaType<T>> ArgsOf(const MambaGates& gates) {
  return {.tokens = gates.raw.rows,
          .heads = gates.raw.cols,
          .stride = gates.raw.stride,
          .low = static_cast<float>(gates.low),
          .high = gates.high > 0 ? static_cast<float>(gates.high) : std::numeric_limits<float>::infinity(),
          .raw = CudaData<T>(gates.raw),
          .bias = CudaData<float>(gates.bias),
          .a_log = CudaData<float>(gates.a_log)};
}

}  // namespace

template <typename T>
absl::Status MambaGatesForward(CudaTag, Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a) {
  return CudaStatus("mamba_gates forward", CudaMambaGatesForward(ArgsOf<T>(gates), CudaData<float>(dt),
                                                                 CudaData<float>(a), ctx.stream()));
}

template <typename T>
absl::Status MambaGatesBackward(CudaTag, Context& ctx, const MambaGates& gates,
                                const MambaGatesGradients& gradients) {
  ArenaScope scope(ctx.scratch);
  const int64_t scratch = CudaMambaGatesScratch(gates.raw.rows, gates.raw.cols);
  const CudaMambaGatesGradients<CudaType<T>> to{
      .ddt = CudaDataOrNull<float>(gradients.ddt),
      .da = CudaData<float>(gradients.da),
      .draw = CudaData<T>(gradients.draw),
      .draw_stride = gradients.draw.stride,
      .dbias = CudaData<float>(gradients.dbias),
      .da_log = CudaData<float>(gradients.da_log),
      .scratch = CudaData<float>(ctx.scratch.Allocate(DType::kF32, {scratch}))};
  return CudaStatus("mamba_gates backward", CudaMambaGatesBackward(ArgsOf<T>(gates), to, ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                            \
  template absl::Status MambaGatesForward<T>(CudaTag, Context&, const MambaGates&, TensorRef, TensorRef); \
  template absl::Status MambaGatesBackward<T>(CudaTag, Context&, const MambaGates&,                       \
                                              const MambaGatesGradients&)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
