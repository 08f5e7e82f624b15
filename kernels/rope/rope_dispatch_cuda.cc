#include "kernels/common/cuda_call.h"
#include "kernels/rope/rope_cuda.h"
#include "kernels/rope/rope_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status Rope(CudaTag, Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first) {
  if (frequencies.pairs() > kCudaRopeMaxPairs) {
    return Invalid("rope.pairs=", frequencies.pairs(), ": expected at most ", kCudaRopeMaxPairs, " on GPUs");
  }
  const CudaRopeArgs<CudaType<T>> args{.rows = x.rows,
                                       .batch = x.batch,
                                       .heads = x.heads,
                                       .dim = x.dim,
                                       .first = first,
                                       .pairs = frequencies.pairs(),
                                       .row_stride = x.row_stride,
                                       .batch_stride = x.batch_stride,
                                       .x = CudaData<T>(x),
                                       .positions = CudaData<int64_t>(positions),
                                       .radians = frequencies.radians.data(),
                                       .scale = static_cast<float>(frequencies.scale),
                                       .inverse = direction == RopeDirection::kGradient};
  return CudaStatus("rope", CudaRope(args, ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                            \
  template absl::Status Rope<T>(CudaTag, Context&, ConstTensorRef, const RopeFrequencies&, RopeDirection, \
                                HeadsRef, int64_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
