#pragma once

// Heads of the ops as the CUDA kernels take them, and heads in scratch memory.

#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "kernels/attention/attention_block_cuda.h"
#include "kernels/common/cuda_call.h"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {

template <typename T>
CudaHeads<const CudaType<T>> CudaHeadsOf(const ConstHeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}
template <typename T>
CudaHeads<CudaType<T>> CudaHeadsOf(const HeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}

// The same as rows of heads * dim columns.
inline RowsShape RowsOf(const ConstHeadsRef& x) {
  return {.rows = x.rows, .batch = x.batch, .columns = x.heads * x.dim};
}
template <typename T>
StridedRows<const CudaType<T>> StridedOf(const ConstHeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}
template <typename T>
StridedRows<CudaType<T>> StridedOf(const HeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}

// Uninitialised and dense, in the shape of `x`.
inline HeadsRef ScratchLike(Context& ctx, DType dtype, const ConstHeadsRef& x) {
  const int64_t columns = x.heads * x.dim;
  const TensorRef memory = ctx.scratch.Allocate(dtype, {x.rows, x.batch, columns});
  return HeadsOf(memory, 0, x.heads, x.dim);
}

}  // namespace annulus::kernels
