// Matrix products by CBLAS.

#include "kernels/common/blas.h"
#include "kernels/linear/linear_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
BlasOperand<T> Operand(const ConstMatrixRef& m, Transpose transpose = Transpose::kNo) {
  return {static_cast<const T*>(m.data), m.stride, transpose};
}

template <typename T>
T Beta(Write write) {
  return write == Write::kAccumulate ? T{1} : T{0};
}

}  // namespace

template <typename T>
absl::Status LinearForward(CpuTag, Context&, ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y) {
  Gemm<T>({.m = y.rows,
           .n = y.cols,
           .k = x.cols,
           .a = Operand<T>(x),
           .b = Operand<T>(w, Transpose::kYes),
           .beta = Beta<T>(write),
           .c = static_cast<T*>(y.data),
           .c_stride = y.stride});
  return absl::OkStatus();
}

template <typename T>
absl::Status LinearBackwardInput(CpuTag, Context&, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx) {
  Gemm<T>({.m = dx.rows,
           .n = dx.cols,
           .k = dy.cols,
           .a = Operand<T>(dy),
           .b = Operand<T>(w),
           .beta = Beta<T>(write),
           .c = static_cast<T*>(dx.data),
           .c_stride = dx.stride});
  return absl::OkStatus();
}

template <typename T>
absl::Status LinearBackwardWeight(CpuTag, Context&, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw) {
  Gemm<T>({.m = dw.rows,
           .n = dw.cols,
           .k = dy.rows,
           .a = Operand<T>(dy, Transpose::kYes),
           .b = Operand<T>(x),
           .beta = 1,
           .c = static_cast<T*>(dw.data),
           .c_stride = dw.stride});
  return absl::OkStatus();
}

template absl::Status LinearForward<float>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                           MatrixRef);
template absl::Status LinearForward<double>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                            MatrixRef);
template absl::Status LinearBackwardInput<float>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                                 MatrixRef);
template absl::Status LinearBackwardInput<double>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef, Write,
                                                  MatrixRef);
template absl::Status LinearBackwardWeight<float>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef,
                                                  MatrixRef);
template absl::Status LinearBackwardWeight<double>(CpuTag, Context&, ConstMatrixRef, ConstMatrixRef,
                                                   MatrixRef);

}  // namespace annulus::kernels
