#pragma once

// CUDA kernels of annulus/ops/state.h.

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// out = factor in + state for each of `count` states of n elements; in null: out = state.
cudaError_t CudaScaleStates(int64_t count, int64_t n, const float* factors, const float* in,
                            const float* state, float* out, cudaStream_t stream);

enum class MatrixForm { kPlain, kTransposed };

// out = matrix in + state for each of `count` matrices [k, k] and states [k, v]; state null: 0. out may be in
// or state, not the matrix.
struct CudaAdvanceStatesArgs {
  int64_t count = 0, k = 0, v = 0;
  MatrixForm form = MatrixForm::kPlain;
  const float* matrix = nullptr;
  const float* in = nullptr;
  const float* state = nullptr;
  float* out = nullptr;
};
// k: at most kMaxStateRows
inline constexpr int64_t kMaxStateRows = 1024;
cudaError_t CudaAdvanceStates(const CudaAdvanceStatesArgs& args, cudaStream_t stream);

}  // namespace annulus::kernels
