#include "kernels/common/cuda_call.h"
#include "kernels/silu/silu_cuda.h"
#include "kernels/silu/silu_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status SiluForward(CudaTag, Context& ctx, ConstMatrixRef x, MatrixRef y) {
  using D = CudaType<T>;
  const SiluShape shape{.rows = x.rows, .columns = x.cols, .x_stride = x.stride, .y_stride = y.stride};
  return CudaStatus("silu forward", CudaSiluForward(shape, static_cast<const D*>(x.data),
                                                    static_cast<D*>(y.data), ctx.stream()));
}

template <typename T>
absl::Status SiluBackward(CudaTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx) {
  using D = CudaType<T>;
  const SiluShape shape{
      .rows = x.rows, .columns = x.cols, .x_stride = x.stride, .dy_stride = dy.stride, .y_stride = dx.stride};
  return CudaStatus("silu backward",
                    CudaSiluBackward(shape, static_cast<const D*>(x.data), static_cast<const D*>(dy.data),
                                     static_cast<D*>(dx.data), ctx.stream()));
}

template absl::Status SiluForward<float>(CudaTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluForward<BFloat16>(CudaTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<float>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<BFloat16>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);

}  // namespace annulus::kernels
