#pragma once

// Handles of the CUDA libraries that the ops of a context use, with their memory and plans. Included by
// *_cuda.cc only.

#include <memory>

#include "annulus/device/context.h"
#include "kernels/linear/linear_cuda.h"
#if ANNULUS_HAS_CUDNN
#include "kernels/attention/cudnn_attention.h"
#endif

namespace annulus::kernels {

class CudaLibraries : public OpState {
 public:
  explicit CudaLibraries(Device device);

  CudaLinearCall Linear(const Context& ctx) const;
#if ANNULUS_HAS_CUDNN
  CudnnAttention& Cudnn();  // made at first use
#endif

 private:
  std::unique_ptr<CublasLt> cublas_lt_;
  Buffer cublas_lt_workspace_;
#if ANNULUS_HAS_CUDNN
  std::unique_ptr<CudnnAttention> cudnn_;
#endif
};

// Those of ctx, made at first use. A library that cannot start ends the job, as a lost device does.
CudaLibraries& LibrariesOf(Context& ctx);

}  // namespace annulus::kernels
