#pragma once

// CUDA kernel of annulus/ops/adamw.h on an f32 shard, with the clip factor read on the device and the
// parameter's bf16 copy written in the same pass.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

struct CudaAdamWArgs {
  int64_t elements = 0;
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  double gradient_scale = 1;           // beside the clip factor
  int64_t step = 1;                    // 1 for the first update
  const float* clip_factor = nullptr;  // device scalar; nullptr: 1
  float* param = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  const float* grad = nullptr;
  __nv_bfloat16* param_bf16 = nullptr;  // optional copy
};
cudaError_t CudaAdamW(const CudaAdamWArgs& args, cudaStream_t stream);

}  // namespace annulus::kernels
