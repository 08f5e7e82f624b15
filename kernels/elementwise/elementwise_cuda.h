#pragma once

// CUDA kernels of small element-wise operations and reductions. Pointers are device memory, sizes and strides
// count elements. Arrays on 16 bytes go by 16-byte accesses, others element by element.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels {

// y = x, rounded to nearest even.   From, To: float, __nv_bfloat16
template <typename From, typename To>
cudaError_t CudaCast(const From* x, int64_t elements, To* y, cudaStream_t stream);

// y += x in f32, rounded once to To.
template <typename From, typename To>
cudaError_t CudaAdd(const From* x, int64_t elements, To* y, cudaStream_t stream);

// x *= factor
template <typename T>
cudaError_t CudaScale(double factor, int64_t elements, T* x, cudaStream_t stream);

cudaError_t CudaZero(void* x, int64_t bytes, cudaStream_t stream);

// Each of `rows` rows of y = x.
template <typename T>
cudaError_t CudaRepeatRow(const T* x, int64_t rows, int64_t columns, T* y, cudaStream_t stream);

// [rows, batch, columns] with free strides between rows and between batch items; columns are contiguous.
template <typename T>
struct StridedRows {
  T* data = nullptr;
  int64_t row_stride = 0, batch_stride = 0;
};
struct RowsShape {
  int64_t rows = 0, batch = 1, columns = 0;
};

// y += x, and y = x. The first gathers 16-bit partial gradients in f32, the second writes a finished carry.
template <typename From, typename To>
cudaError_t CudaAddRows(const RowsShape& shape, StridedRows<const From> x, StridedRows<To> y,
                        cudaStream_t stream);
template <typename From, typename To>
cudaError_t CudaCastRows(const RowsShape& shape, StridedRows<const From> x, StridedRows<To> y,
                         cudaStream_t stream);

// *sum += sum of squares: f32 within 8 elements, f64 between them, in an order that depends on `elements`
// only.
//   scratch: kSumOfSquaresScratch doubles
inline constexpr int64_t kSumOfSquaresScratch = 1024;
template <typename T>
cudaError_t CudaSumOfSquares(const T* x, int64_t elements, double* scratch, double* sum, cudaStream_t stream);

// *factor = min(1, max_norm / sqrt(stats[0])), 1 if max_norm is 0; NaN unless all of stats[0, count) are
// finite. On the device, so that no host waits between the norm and AdamW.
cudaError_t CudaClipFactor(const double* stats, int64_t count, double max_norm, double* factor,
                           cudaStream_t stream);

}  // namespace annulus::kernels
