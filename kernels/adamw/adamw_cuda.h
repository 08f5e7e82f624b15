#pragma once

// CUDA kernel of annulus/ops/adamw.h on an f32 shard, with the clip factor read on the device and the
// parameter's rounded copy written in the same pass.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// Copy: float, __nv_bfloat16
template <typename Copy>
struct CudaAdamWArgs {
  int64_t elements = 0;
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  int64_t step = 1;                        // 1 for the first update
  const double* gradient_scale = nullptr;  // device scalar. NaN: no memory is read or written
  float* param = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  const float* grad = nullptr;
  Copy* copy = nullptr;  // optional
};
template <typename Copy>
cudaError_t CudaAdamW(const CudaAdamWArgs<Copy>& args, cudaStream_t stream);

}  // namespace annulus::kernels
