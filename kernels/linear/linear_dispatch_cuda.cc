#include "kernels/common/cuda_libraries.h"
#include "kernels/linear/linear_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
constexpr CudaElement kElement = sizeof(T) == 2 ? CudaElement::kBf16 : CudaElement::kF32;

CudaMatrix Operand(const ConstMatrixRef& m) { return {m.data, m.stride}; }

CudaWrite WriteOf(Write write) {
  return write == Write::kAccumulate ? CudaWrite::kAccumulate : CudaWrite::kOverwrite;
}

}  // namespace

template <typename T>
absl::Status LinearForward(CudaTag, Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write,
                           MatrixRef y) {
  return CudaLinearForward(LibrariesOf(ctx).Linear(ctx),
                           {.shape = {.tokens = y.rows, .in = x.cols, .out = y.cols},
                            .operands = kElement<T>,
                            .result = kElement<T>,
                            .x = Operand(x),
                            .w = Operand(w),
                            .write = WriteOf(write),
                            .y = y.data,
                            .y_stride = y.stride});
}

template <typename T>
absl::Status LinearBackwardInput(CudaTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx) {
  return CudaLinearBackwardInput(LibrariesOf(ctx).Linear(ctx),
                                 {.shape = {.tokens = dx.rows, .in = dx.cols, .out = dy.cols},
                                  .operands = kElement<T>,
                                  .result = dx.dtype == DType::kF32 ? CudaElement::kF32 : kElement<T>,
                                  .dy = Operand(dy),
                                  .w = Operand(w),
                                  .write = WriteOf(write),
                                  .dx = dx.data,
                                  .dx_stride = dx.stride});
}

template <typename T>
absl::Status LinearBackwardWeight(CudaTag, Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw) {
  return CudaLinearBackwardWeight(LibrariesOf(ctx).Linear(ctx),
                                  {.shape = {.tokens = dy.rows, .in = dw.cols, .out = dw.rows},
                                   .operands = kElement<T>,
                                   .dy = Operand(dy),
                                   .x = Operand(x),
                                   .dw = static_cast<float*>(dw.data),
                                   .dw_stride = dw.stride});
}

template absl::Status LinearForward<float>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                           MatrixRef);
template absl::Status LinearForward<BFloat16>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                              MatrixRef);
template absl::Status LinearBackwardInput<float>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                                 MatrixRef);
template absl::Status LinearBackwardInput<BFloat16>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                                    MatrixRef);
template absl::Status LinearBackwardWeight<float>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef,
                                                  MatrixRef);
template absl::Status LinearBackwardWeight<BFloat16>(CudaTag, Context&, ConstMatrixRef, ConstMatrixRef,
                                                     MatrixRef);

}  // namespace annulus::kernels
