#pragma once

// CUDA kernels of annulus/ops/ssd.h on Hopper's tensor cores: bf16, chunks of 128 rows, 64 or 128 columns of
// state, heads of a multiple of 64 columns. Products are of bf16 operands in f32; states are carried in f32
// and rounded once or twice on their way to a product.
//
// Memory of states: a slot of the size of its f32 state for each chunk and head. Consecutive chunks of a
// segment make a super. One CTA walks along a super with the state in its registers and leaves in each slot
// but the first of the super the state that the super's earlier chunks leave (bf16), and in the first the
// state of the whole super (f32). A scan over supers replaces that by the state at the super's start (bf16);
// what reads a state adds that of its super, decayed. Backward the same from the end. So a state is written
// once and read once, in 16 bits.
//
// Per token and head of 64 columns, with N = 128 and 10 heads to a group: bytes of device memory and FLOPs;
// for 131,072 tokens and 80 heads the time of the bytes at 4.2 TB/s and that of the FLOPs at 600 TFLOP/s:
//
//   chunk states            reads x 128, b 26; writes states 128              282 B 0.70 ms  16 k 0.28 ms
//   forward                 reads x 128, b c 51, states 128; writes y 128     435 B 1.09 ms  31 k 0.54 ms
//   backward chunk states   reads dy 128, c 26; writes gradients 128          282 B 0.70 ms  16 k 0.28 ms
//   backward                reads x dy 256, b c 51, states 256;
//                           writes dx 128, db dc 51                           742 B 1.85 ms  81 k 1.42 ms
//
// Backward reads dy and the gradients of states a second time, of which L2 keeps a part: 256 B at most.
//
// Measured on an H200: 1.14, 1.65, 1.08 and 4.43 ms.

#include "kernels/ssd/ssd_cuda.h"

namespace annulus::kernels {

// Whether these kernels know the shape and the calling thread's device. What they take must lie on 16 bytes,
// strides too.
bool MmaSsdKnows(const CudaSsd<__nv_bfloat16>& ssd);

cudaError_t MmaSsdChunkStates(const CudaSsd<__nv_bfloat16>& ssd, const CudaSsdStates& states,
                              const CudaSsdSummary& summary, cudaStream_t stream);
cudaError_t MmaSsdForward(const CudaSsd<__nv_bfloat16>& ssd, const float* initial,
                          const CudaSsdStates& states, StridedRows<__nv_bfloat16> y, cudaStream_t stream);
// gradients.decays: those of the forward states
cudaError_t MmaSsdBackwardChunkStates(const CudaSsd<__nv_bfloat16>& ssd, StridedRows<const __nv_bfloat16> dy,
                                      const CudaSsdStates& gradients, const CudaSsdSummary& summary,
                                      cudaStream_t stream);
cudaError_t MmaSsdBackward(const CudaSsd<__nv_bfloat16>& ssd, const CudaSsdStates& states, float* gradients,
                           const CudaSsdGradients<__nv_bfloat16>& out, void* scratch, cudaStream_t stream);
int64_t MmaSsdBackwardScratchBytes(const CudaSsd<__nv_bfloat16>& ssd);

}  // namespace annulus::kernels
