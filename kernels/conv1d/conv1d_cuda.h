#pragma once

// CUDA kernels of annulus/ops/conv1d.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/segments_cuda.h"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {

inline constexpr int kMaxConvTaps = 8;

//   w: [channels, k]   ages: [rows, batch]   halo: [segments, k - 1, batch, channels]
template <typename T>
struct CudaConv1dArgs {
  int64_t rows = 0, batch = 0, channels = 0;
  int k = 0;
  SegmentTable tiles;  // chunk: CudaConv1dTileRows(...)
  const T* w = nullptr;
  const T* bias = nullptr;  // null: none
  const int32_t* ages = nullptr;
  const T* halo = nullptr;
  StridedRows<const T> x;
};

// Rows that a thread walks along, of the forward and of the backward.
struct ConvTileRows {
  int64_t forward = 0, backward = 0;
};
ConvTileRows CudaConv1dTileRows(int64_t rows, int64_t batch, int64_t channels);

template <typename T>
cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>& args, StridedRows<T> y, cudaStream_t stream);

// dx and, of segments that have rows, dhalo are overwritten; dw and dbias are added to, in an order fixed by
// the shape.   scratch: CudaConv1dScratch(args) floats
template <typename T>
struct CudaConv1dGradients {
  StridedRows<const T> dy;
  StridedRows<T> dx;
  T* dhalo = nullptr;
  float* dw = nullptr;
  float* dbias = nullptr;
  float* scratch = nullptr;
};
template <typename T>
cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>& args, const CudaConv1dGradients<T>& gradients,
                               cudaStream_t stream);
template <typename T>
int64_t CudaConv1dScratch(const CudaConv1dArgs<T>& args) {
  return args.tiles.chunks() * args.batch * (args.k + 1) * args.channels;
}

}  // namespace annulus::kernels
