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

template <typename T>
absl::Status SigmoidForward(CudaTag, Context& ctx, ConstMatrixRef x, TensorRef y) {
  const SiluShape shape{.rows = x.rows, .columns = x.cols, .x_stride = x.stride};
  return CudaStatus("sigmoid forward", CudaSigmoidForward(shape, static_cast<const CudaType<T>*>(x.data),
                                                          CudaData<float>(y), ctx.stream()));
}

template <typename T>
absl::Status SigmoidBackward(CudaTag, Context& ctx, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx) {
  const SiluShape shape{.rows = dx.rows, .columns = dx.cols, .y_stride = dx.stride};
  return CudaStatus("sigmoid backward",
                    CudaSigmoidBackward(shape, CudaData<float>(y), CudaData<float>(dy),
                                        static_cast<CudaType<T>*>(dx.data), ctx.stream()));
}

template absl::Status SigmoidForward<float>(CudaTag, Context&, ConstMatrixRef, TensorRef);
template absl::Status SigmoidForward<BFloat16>(CudaTag, Context&, ConstMatrixRef, TensorRef);
template absl::Status SigmoidBackward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, MatrixRef);
template absl::Status SigmoidBackward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, MatrixRef);
template absl::Status SiluForward<float>(CudaTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluForward<BFloat16>(CudaTag, Context&, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<float>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);
template absl::Status SiluBackward<BFloat16>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, MatrixRef);

}  // namespace annulus::kernels
