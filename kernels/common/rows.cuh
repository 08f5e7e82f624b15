#pragma once

// Element-wise kernels over `rows` rows of `columns` elements; a flat array is one row. An op says what one
// vector of N elements does, in two phases so that all loads of a thread are in flight before its first
// store:
//
//   struct Op {
//     template <int N> using State = ...;                                       // registers between the
//     phases template <int N> __device__ State<N> Load(int64_t row, int64_t column) const; template <int N>
//     __device__ void Store(int64_t row, int64_t column, const State<N>& state) const;
//   };
//
// Every element belongs to one thread, so an op may work in place.

#include "kernels/common/vector.cuh"

namespace annulus::kernels {

inline constexpr int kRowThreads = 128;  // 16 CTAs fill an SM; the last one of a row wastes at most 128 lanes

template <int N, int kUnroll, typename Op>
__global__ void __launch_bounds__(kRowThreads) RowsKernel(int64_t columns, uint32_t blocks_per_row, Op op) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t block = blockIdx.x % blocks_per_row;
  const int64_t vectors = columns / N;
  const int64_t first = block * (kRowThreads * kUnroll) + threadIdx.x;
  typename Op::template State<N> state[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * kRowThreads;
    if (vector < vectors) state[u] = op.template Load<N>(row, vector * N);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * kRowThreads;
    if (vector < vectors) op.template Store<N>(row, vector * N, state[u]);
  }
  if constexpr (N > 1) {  // what no whole vector covers, by the thread after the last vector
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kRowThreads != vectors) continue;
      for (int64_t column = vectors * N; column < columns; ++column) {
        op.template Store<1>(row, column, op.template Load<1>(row, column));
      }
    }
  }
}

template <int N, int kUnroll, typename Op>
cudaError_t LaunchRowsOf(int64_t rows, int64_t columns, const Op& op, cudaStream_t stream) {
  const int64_t items = CeilDiv(columns, N);  // a partial vector is one item
  const int64_t blocks_per_row = CeilDiv(items, int64_t{kRowThreads} * kUnroll);
  const int64_t blocks = rows * blocks_per_row;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  RowsKernel<N, kUnroll><<<static_cast<uint32_t>(blocks), kRowThreads, 0, stream>>>(
      columns, static_cast<uint32_t>(blocks_per_row), op);
  return cudaGetLastError();
}

// N elements a vector if `vectors_fit` (every row starts on 16 bytes of its widest array), else one by one.
template <int N, int kUnroll, typename Op>
cudaError_t LaunchRows(int64_t rows, int64_t columns, bool vectors_fit, const Op& op, cudaStream_t stream) {
  return vectors_fit ? LaunchRowsOf<N, kUnroll>(rows, columns, op, stream)
                     : LaunchRowsOf<1, kUnroll>(rows, columns, op, stream);
}

}  // namespace annulus::kernels
