#pragma once

// CUDA kernels of annulus/ops/gated_norm.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

enum class CudaGate { kSiluBefore, kSiluAfter, kSigmoidAfter };

// kWhole: all in one pass. Where the columns of a group are spread: kSums leaves what is summed over them in
// `sums`, kFinish takes it from there.
enum class NormPass { kWhole, kSums, kFinish };

// Rows of groups * columns elements, a stride for each operand.
template <typename T>
struct CudaGatedNormArgs {
  int64_t tokens = 0, groups = 0;
  int64_t columns = 0;        // of a group, here
  int64_t group_columns = 0;  // of a group, everywhere
  int64_t weight_step = 0;    // from the weights of a group to the next one's: columns, or 0 if shared
  double eps = 0;
  CudaGate gate_kind = CudaGate::kSiluBefore;
  NormPass pass = NormPass::kWhole;
  const T* x = nullptr;
  const T* gate = nullptr;
  const T* w = nullptr;
  int64_t x_stride = 0, gate_stride = 0;
  float* sums = nullptr;  // [tokens, groups] forward, [tokens, 2 groups] backward
};

// columns: at most 32768 (bf16) or 16384 (f32); at most 4096 where rows do not lie on 16 bytes.
template <typename T>
cudaError_t CudaGatedNormForward(const CudaGatedNormArgs<T>& args, T* y, int64_t y_stride,
                                 cudaStream_t stream);

// dw is added to, in an order fixed by the device and the shape.
//   scratch: CudaGatedNormScratch(groups, columns) floats
template <typename T>
struct CudaGatedNormGradients {
  const T* dy = nullptr;
  T* dx = nullptr;
  T* dgate = nullptr;
  int64_t dy_stride = 0, dx_stride = 0, dgate_stride = 0;
  float* dw = nullptr;
  float* scratch = nullptr;
};
// columns: at most 16384 (bf16) or 8192 (f32); at most 2048 where rows do not lie on 16 bytes.
template <typename T>
cudaError_t CudaGatedNormBackward(const CudaGatedNormArgs<T>& args,
                                  const CudaGatedNormGradients<T>& gradients, cudaStream_t stream);
int64_t CudaGatedNormScratch(int64_t groups, int64_t columns);

}  // namespace annulus::kernels
