#include "kernels/linear/linear_cuda.h"

namespace annulus::kernels {

absl::Status CudaLinearForward(const CudaLinearCall& call, const CudaLinearForwardArgs& args) {
  return call.library->Multiply({.m = args.shape.tokens,
                                 .n = args.shape.out,
                                 .k = args.shape.in,
                                 .operands = args.operands,
                                 .result = args.result,
                                 .a = args.x,
                                 .b = args.w,
                                 .b_layout = Layout::kTransposed,
                                 .accumulate = args.write == CudaWrite::kAccumulate,
                                 .c = args.y,
                                 .c_stride = args.y_stride},
                                call.workspace, call.stream);
}

absl::Status CudaLinearBackwardInput(const CudaLinearCall& call, const CudaLinearBackwardInputArgs& args) {
  return call.library->Multiply({.m = args.shape.tokens,
                                 .n = args.shape.in,
                                 .k = args.shape.out,
                                 .operands = args.operands,
                                 .result = args.result,
                                 .a = args.dy,
                                 .b = args.w,
                                 .accumulate = args.write == CudaWrite::kAccumulate,
                                 .c = args.dx,
                                 .c_stride = args.dx_stride},
                                call.workspace, call.stream);
}

absl::Status CudaLinearBackwardWeight(const CudaLinearCall& call, const CudaLinearBackwardWeightArgs& args) {
  return call.library->Multiply({.m = args.shape.out,
                                 .n = args.shape.in,
                                 .k = args.shape.tokens,
                                 .operands = args.operands,
                                 .result = CudaElement::kF32,
                                 .a = args.dy,
                                 .b = args.x,
                                 .a_layout = Layout::kTransposed,
                                 .accumulate = true,
                                 .c = args.dw,
                                 .c_stride = args.dw_stride},
                                call.workspace, call.stream);
}

}  // namespace annulus::kernels
