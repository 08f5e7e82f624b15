#pragma once

// The three products of a linear layer (annulus/ops/linear.h) on CUDA.

#include "kernels/linear/cublas_lt.h"

namespace annulus::kernels {

struct CudaLinearShape {
  int64_t tokens = 0, in = 0, out = 0;
};
struct CudaLinearCall {
  CublasLt* library = nullptr;
  CudaWorkspace workspace;
  cudaStream_t stream = nullptr;
};
enum class CudaWrite : uint8_t { kOverwrite, kAccumulate };

// y[t, out] (=, +=) sum_in x[t, in] w[out, in]
struct CudaLinearForwardArgs {
  CudaLinearShape shape;
  CudaElement operands = CudaElement::kBf16, result = CudaElement::kBf16;
  CudaMatrix x, w;
  CudaWrite write = CudaWrite::kOverwrite;
  void* y = nullptr;
  int64_t y_stride = 0;
};
absl::Status CudaLinearForward(const CudaLinearCall& call, const CudaLinearForwardArgs& args);

// dx[t, in] (=, +=) sum_out dy[t, out] w[out, in]
struct CudaLinearBackwardInputArgs {
  CudaLinearShape shape;
  CudaElement operands = CudaElement::kBf16, result = CudaElement::kBf16;
  CudaMatrix dy, w;
  CudaWrite write = CudaWrite::kOverwrite;
  void* dx = nullptr;
  int64_t dx_stride = 0;
};
absl::Status CudaLinearBackwardInput(const CudaLinearCall& call, const CudaLinearBackwardInputArgs& args);

// dw[out, in] += sum_t dy[t, out] x[t, in], in f32
struct CudaLinearBackwardWeightArgs {
  CudaLinearShape shape;
  CudaElement operands = CudaElement::kBf16;
  CudaMatrix dy, x;
  float* dw = nullptr;
  int64_t dw_stride = 0;
};
absl::Status CudaLinearBackwardWeight(const CudaLinearCall& call, const CudaLinearBackwardWeightArgs& args);

}  // namespace annulus::kernels
