#include "kernels/common/cuda_call.h"
#include "kernels/rope/rope_cuda.h"
#include "kernels/rope/rope_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status Rope(CudaTag, Context& ctx, ConstTensorRef positions, double theta, RopeDirection direction,
                  HeadsRef x) {
  if (x.dim > kCudaRopeMaxDim) {
    return Invalid("rope.head_dim=", x.dim, ": expected at most ", kCudaRopeMaxDim, " on GPUs");
  }
  const CudaRopeArgs<CudaType<T>> args{.rows = x.rows,
                                       .batch = x.batch,
                                       .heads = x.heads,
                                       .dim = x.dim,
                                       .row_stride = x.row_stride,
                                       .batch_stride = x.batch_stride,
                                       .x = CudaData<T>(x),
                                       .positions = CudaData<int64_t>(positions),
                                       .theta = theta,
                                       .inverse = direction == RopeDirection::kInverse};
  return CudaStatus("rope", CudaRope(args, ctx.stream()));
}

template absl::Status Rope<float>(CudaTag, Context&, ConstTensorRef, double, RopeDirection, HeadsRef);
template absl::Status Rope<BFloat16>(CudaTag, Context&, ConstTensorRef, double, RopeDirection, HeadsRef);

}  // namespace annulus::kernels
