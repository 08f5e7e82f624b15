#pragma once

// CUDA kernel of annulus/ops/columns.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// What one launch moves: the runs one after the other are its columns. Passed by value.
inline constexpr int kMaxColumnRuns = 16;
struct ColumnRuns {
  int count = 0;
  int64_t begin[kMaxColumnRuns] = {};  // of a run in the columns of the launch
  int64_t from[kMaxColumnRuns] = {};   // where it begins in a row of x
  int64_t to[kMaxColumnRuns] = {};     // and of y
  int64_t columns = 0;                 // of all runs together
};

enum class ColumnWrite { kOverwrite, kAdd };

// From, To: float, __nv_bfloat16. Runs do not overlap in y.
template <typename From, typename To>
struct CudaMoveColumnsArgs {
  int64_t rows = 0;
  const From* x = nullptr;
  To* y = nullptr;
  int64_t x_columns = 0, y_columns = 0;
  ColumnRuns runs;
  ColumnWrite write = ColumnWrite::kOverwrite;
};
template <typename From, typename To>
cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<From, To>& args, cudaStream_t stream);

}  // namespace annulus::kernels
