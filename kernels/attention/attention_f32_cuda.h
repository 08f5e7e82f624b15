#pragma once

// Block attention (annulus/ops/attention.h) in f32 arithmetic throughout, for parity with the CPU: no tensor
// cores, head dims up to 256, any strides, every sum in a fixed order.
//
// q_rows and k_rows < 2^31, batch and heads < 2^16. Nothing is allocated and nothing waits for the device.
// Arguments outside of this return cudaErrorInvalidValue.

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::kernels {

bool F32AttentionSupports(int64_t dim, int64_t v_dim);

// Folds the block into `partial`. Rows without an allowed key keep their bits.
cudaError_t F32AttentionForward(const CudaAttentionBlock<float>& block,
                                const CudaAttentionPartial<float>& partial, cudaStream_t stream);

// Adds the block's gradients.
cudaError_t F32AttentionBackward(const CudaAttentionBlock<float>& block,
                                 const CudaAttentionGradients<float>& gradients, cudaStream_t stream);

}  // namespace annulus::kernels
