#pragma once

// Block attention (annulus/ops/attention.h) in bf16 on tensor cores by warp-level instructions: any GPU of
// sm_80 or newer with 160 KB of shared memory per block, head dims 64, 128, and 192 with values of 128.
// Accumulation, carry and gradients are f32.
//
// Pointers are 16-byte aligned, strides of bf16 tensors multiples of 8 elements, of f32 tensors multiples
// of 4. scale > 0; q_rows and k_rows < 2^31. Nothing is allocated and nothing waits for the device. Arguments
// outside of this return cudaErrorInvalidValue.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace annulus::kernels {

// [rows, batch, heads, dim] on the device; heads and dim contiguous, strides in elements.
template <typename T>
struct MmaHeads {
  T* data = nullptr;
  int64_t row_stride = 0, batch_stride = 0;
};

struct MmaAttentionBlock {
  MmaHeads<const __nv_bfloat16> q;  // [q_rows, batch, heads, dim]
  MmaHeads<const __nv_bfloat16> k;  // [k_rows, batch, kv_heads, dim]
  MmaHeads<const __nv_bfloat16> v;  // [k_rows, batch, kv_heads, v_dim]
  int64_t q_rows = 0, k_rows = 0, batch = 0;
  int64_t heads = 0, kv_heads = 0, dim = 0, v_dim = 0;
  const int64_t* lo = nullptr;  // [q_rows, batch] on the device: key positions [lo, hi) a query sees
  const int64_t* hi = nullptr;
  int64_t key_offset = 0, key_stride = 1;  // key row j is at position key_offset + key_stride * j
  float scale = 1;
};

struct MmaAttentionPartial {
  MmaHeads<float> out;             // [q_rows, batch, heads, v_dim], normalised
  float* lse = nullptr;            // [q_rows, batch, heads]
  MmaHeads<__nv_bfloat16> result;  // optional, for the last block: out of every row, rounded
};

struct MmaAttentionGradients {
  MmaHeads<const __nv_bfloat16> dout;  // [q_rows, batch, heads, v_dim]
  const float* lse = nullptr;          // [q_rows, batch, heads], of all blocks together
  const float* delta = nullptr;        // [q_rows, batch, heads], sum of dout * out
  MmaHeads<float> dq, dk, dv;          // added to
};

// How dQ is summed over key tiles: by atomic adds, in an order that changes from run to run, or by a second
// kernel in a fixed order (7 products instead of 5). dK and dV have a fixed order in both.
enum class MmaQueryGradient { kAtomic, kOrdered };

bool MmaAttentionSupports(int64_t dim, int64_t v_dim);

// Folds the block into `partial`. Rows without an allowed key keep their bits.
cudaError_t MmaAttentionForward(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                                cudaStream_t stream);

// Bytes of device memory the backward needs besides its arguments, about 8 per query row and head.
int64_t MmaAttentionBackwardWorkspaceBytes(const MmaAttentionBlock& block);

// Adds the block's gradients. `workspace` is 16-byte aligned.
cudaError_t MmaAttentionBackward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                 MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream);

}  // namespace annulus::kernels
