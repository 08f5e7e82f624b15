#pragma once

// What the CUDA kernels of block attention are given (annulus/ops/attention.h on raw device pointers). T is
// the dtype of activations; partial results, statistics and gradients are f32.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace annulus::kernels {

// [rows, batch, heads, dim] on the device; heads and dim contiguous, strides in elements.
template <typename T>
struct CudaHeads {
  T* data = nullptr;
  int64_t row_stride = 0, batch_stride = 0;
};

template <typename T>
struct CudaAttentionBlock {
  CudaHeads<const T> q;  // [q_rows, batch, heads, dim]
  CudaHeads<const T> k;  // [k_rows, batch, kv_heads, dim]
  CudaHeads<const T> v;  // [k_rows, batch, kv_heads, v_dim]
  int64_t q_rows = 0, k_rows = 0, batch = 0;
  int64_t heads = 0, kv_heads = 0, dim = 0, v_dim = 0;
  const int64_t* lo = nullptr;  // [q_rows, batch] on the device: key positions [lo, hi) a query sees
  const int64_t* hi = nullptr;
  int64_t key_offset = 0, key_stride = 1;  // key row j is at position key_offset + key_stride * j
  float scale = 1;
};

template <typename T>
struct CudaAttentionPartial {
  CudaHeads<float> out;  // [q_rows, batch, heads, v_dim], normalised
  float* lse = nullptr;  // [q_rows, batch, heads]
  CudaHeads<T> result;   // optional, for the last block: out of every row, rounded; 0 where LSE is -inf
};

template <typename T>
struct CudaAttentionGradients {
  CudaHeads<const T> dout;       // [q_rows, batch, heads, v_dim]
  const float* lse = nullptr;    // [q_rows, batch, heads], of all blocks together
  const float* delta = nullptr;  // [q_rows, batch, heads], sum of dout * out; not read where LSE is -inf
  CudaHeads<float> dq, dk, dv;   // added to
};

}  // namespace annulus::kernels
