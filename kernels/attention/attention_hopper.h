#pragma once

// Block attention (annulus/ops/attention.h) in bf16 on Hopper (sm_90a): head dims 64, 128, and 192 with
// values of 128. Accumulation and carry are f32.
//
// Checked against f64 on one H200 (tests/cuda/attention_hopper) and in emulation (tests/emulation).
//
// Pointers are 16-byte aligned, strides of bf16 tensors multiples of 8 elements, of f32 tensors multiples
// of 4. scale > 0; q_rows and k_rows < 2^31. Nothing is allocated and nothing waits for the device. Arguments
// outside of this return cudaErrorInvalidValue.

#include <cuda_bf16.h>

#include "kernels/attention/attention_block_cuda.h"
#include "kernels/attention/attention_mma.h"

namespace annulus::kernels {

using HopperAttentionBlock = CudaAttentionBlock<__nv_bfloat16>;
using HopperAttentionPartial = CudaAttentionPartial<__nv_bfloat16>;
using HopperAttentionGradients = CudaAttentionGradients<__nv_bfloat16>;

// Bytes of device memory the forward needs besides its arguments, about 8 per query row.
int64_t HopperAttentionForwardWorkspaceBytes(const HopperAttentionBlock& block);

// Folds the block into `partial`. Rows without an allowed key keep their bits. `workspace` is 16-byte
// aligned.
cudaError_t HopperAttentionForward(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                   void* workspace, cudaStream_t stream);

// The same where the block holds all keys of its queries: nothing is carried, and out is rounded.
//   out: [q_rows, batch, heads, v_dim], 0 for rows without an allowed key   lse: [q_rows, batch, heads]
cudaError_t HopperAttentionForwardWhole(const HopperAttentionBlock& block, CudaHeads<__nv_bfloat16> out,
                                        float* lse, void* workspace, cudaStream_t stream);

// Bytes of device memory the backward needs besides its arguments, on the current device: about 8 per query
// row and head; in a fixed order up to 1 MB per multiprocessor more.
int64_t HopperAttentionBackwardWorkspaceBytes(const HopperAttentionBlock& block,
                                              MmaQueryGradient query_gradient);

// Adds the block's gradients. In a fixed order (kOrdered) thread blocks take turns at dQ, so there are no
// more products than in any order. `workspace` is 16-byte aligned.
cudaError_t HopperAttentionBackward(const HopperAttentionBlock& block,
                                    const HopperAttentionGradients& gradients,
                                    MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream);

}  // namespace annulus::kernels
