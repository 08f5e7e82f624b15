#pragma once

// What the adapters from the ops of recurrent layers to CUDA launchers share. Included by *_cuda.cc only.

#include "annulus/base/row_range.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/linear.h"
#include "kernels/common/cuda_call.h"
#include "kernels/common/heads_shape_cuda.h"
#include "kernels/common/segments.h"
#include "kernels/common/segments_cuda.h"

namespace annulus::kernels {

template <typename T>
StridedRows<const CudaType<T>> HeadRows(const ConstHeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}
template <typename T>
StridedRows<CudaType<T>> HeadRows(const HeadsRef& x) {
  return {CudaData<T>(x), x.row_stride, x.batch_stride};
}

inline HeadsShape ShapeOf(const ConstHeadsRef& x) {
  return {.rows = x.rows, .batch = x.batch, .heads = x.heads};
}

// T must be the matrix's dtype.
template <typename T>
const CudaType<T>* CudaData(const ConstMatrixRef& x) {
  ANNULUS_CHECK(x.dtype == DTypeOf<T>()) << "matrix is " << Name(x.dtype);
  return static_cast<const CudaType<T>*>(x.data);
}
template <typename T>
CudaType<T>* CudaData(const MatrixRef& x) {
  ANNULUS_CHECK(x.dtype == DTypeOf<T>()) << "matrix is " << Name(x.dtype);
  return static_cast<CudaType<T>*>(x.data);
}

// null where the tensor is undefined
template <typename T>
const CudaType<T>* CudaDataOrNull(const ConstTensorRef& x) {
  return x.defined() ? CudaData<T>(x) : nullptr;
}
template <typename T>
CudaType<T>* CudaDataOrNull(const TensorRef& x) {
  return x.defined() ? CudaData<T>(x) : nullptr;
}

inline absl::StatusOr<SegmentTable> MakeSegmentTable(absl::string_view name,
                                                     absl::Span<const RowRange> segments, int64_t chunk) {
  if (segments.size() > kMaxSegments) {
    return Invalid(name, ": ", segments.size(), " segments: expected at most ", kMaxSegments, " on GPUs");
  }
  SegmentTable table{.count = static_cast<int>(segments.size()), .chunk = chunk};
  for (size_t s = 0; s < segments.size(); ++s) {
    table.begin[s + 1] = segments[s].end;
    table.first_chunk[s + 1] = table.first_chunk[s] + CountChunks(segments.subspan(s, 1), chunk);
  }
  return table;
}

}  // namespace annulus::kernels
