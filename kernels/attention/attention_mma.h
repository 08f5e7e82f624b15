#pragma once

// Block attention (annulus/ops/attention.h) in bf16 on tensor cores by warp-level instructions: any GPU of
// sm_80 or newer with 160 KB of shared memory per block, head dims 64, 128, and 192 with values of 128.
// Accumulation, carry and gradients are f32.
//
// Pointers are 16-byte aligned, strides of bf16 tensors multiples of 8 elements, of f32 tensors multiples
// of 4. scale > 0; q_rows and k_rows < 2^31. Nothing is allocated and nothing waits for the device. Arguments
// outside of this return cudaErrorInvalidValue.

#include <cuda_bf16.h>

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::kernels {

using MmaAttentionBlock = CudaAttentionBlock<__nv_bfloat16>;
using MmaAttentionPartial = CudaAttentionPartial<__nv_bfloat16>;
using MmaAttentionGradients = CudaAttentionGradients<__nv_bfloat16>;

// How gradients are summed over thread blocks: by atomic adds, in an order that changes from run to run, or
// in a fixed order, for which dQ takes a second kernel (7 products instead of 5).
enum class MmaQueryGradient { kAtomic, kOrdered };

// Folds the block into `partial`. Rows without an allowed key keep their bits.
cudaError_t MmaAttentionForward(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                                cudaStream_t stream);

// Bytes of device memory the backward needs besides its arguments, on the current device: about 8 per query
// row and head; in a fixed order up to 1 MB per multiprocessor more.
int64_t MmaAttentionBackwardWorkspaceBytes(const MmaAttentionBlock& block, MmaQueryGradient query_gradient);

// Adds the block's gradients. `workspace` is 16-byte aligned.
cudaError_t MmaAttentionBackward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                 MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream);

}  // namespace annulus::kernels
