#pragma once

// CUDA kernels of annulus/ops/taylor_features.h.

#include "kernels/common/heads_shape_cuda.h"

namespace annulus::kernels {

// x: heads of `dim`   y: of 1 + dim + dim^2
template <typename T>
cudaError_t CudaTaylorForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, StridedRows<T> y,
                              cudaStream_t stream);
template <typename T>
cudaError_t CudaTaylorBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x,
                               StridedRows<const T> dy, StridedRows<T> dx, cudaStream_t stream);

// num, dnum: heads of dim + 1   o, dout: of `dim`
template <typename T>
cudaError_t CudaNormaliseForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> num, float eps,
                                 StridedRows<T> o, cudaStream_t stream);
template <typename T>
cudaError_t CudaNormaliseBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> num, float eps,
                                  StridedRows<const T> dout, StridedRows<T> dnum, cudaStream_t stream);

// x: heads of x_dim   y: of y_dim, of which the first are x's and what is past them is 1.
template <typename T>
cudaError_t CudaCopyHeads(const HeadsShape& shape, int64_t x_dim, StridedRows<const T> x, int64_t y_dim,
                          StridedRows<T> y, cudaStream_t stream);

}  // namespace annulus::kernels
