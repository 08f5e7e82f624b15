#pragma once

// CUDA kernels of annulus/ops/ssd.h, plain: any shape, f32 arithmetic. Those for tensor cores are in
// ssd_mma.h.
//
// A chunk's quadratic part goes through matrices [chunk, chunk] in scratch memory, a slice of chunks at a
// time; every product is one launch over all chunks and heads of a slice.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/segments_cuda.h"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {

// T: float or __nv_bfloat16. Shapes as in annulus/ops/ssd.h.
template <typename T>
struct CudaSsd {
  int64_t rows = 0, batch = 0, heads = 0, groups = 0;
  int64_t dim = 0, state = 0;
  SegmentTable chunks;
  StridedRows<const T> x, b, c;
  const float* dt = nullptr;  // null: 1
  const float* a = nullptr;
  const float* skip = nullptr;  // null: 0
  const int32_t* ages = nullptr;

  int64_t all_heads() const { return batch * heads; }
  int64_t state_elements() const { return state * dim; }
};

struct CudaSsdStates {
  float* states = nullptr;  // [chunks, batch * heads, state, dim]
  float* decays = nullptr;  // [chunks, batch * heads], logarithms
};
struct CudaSsdSummary {
  float* transition = nullptr;  // [segments, batch * heads]
  float* state = nullptr;       // [segments, batch * heads, state, dim]
};

// Scratch memory of each call below, in bytes.
template <typename T>
int64_t PlainSsdScratchBytes(const CudaSsd<T>& ssd);

template <typename T>
cudaError_t PlainSsdChunkStates(const CudaSsd<T>& ssd, const CudaSsdStates& states,
                                const CudaSsdSummary& summary, void* scratch, cudaStream_t stream);
template <typename T>
cudaError_t PlainSsdForward(const CudaSsd<T>& ssd, const float* initial, const CudaSsdStates& states,
                            StridedRows<T> y, void* scratch, cudaStream_t stream);
template <typename T>
cudaError_t PlainSsdBackwardChunkStates(const CudaSsd<T>& ssd, StridedRows<const T> dy,
                                        const CudaSsdStates& gradients, const CudaSsdSummary& summary,
                                        void* scratch, cudaStream_t stream);

template <typename T>
struct CudaSsdGradients {
  StridedRows<const T> dy;
  StridedRows<T> dx, db, dc;
  const float* final_gradient = nullptr;  // null: 0
  float* ddt = nullptr;                   // null where dt is
  float* da = nullptr;
  float* dskip = nullptr;  // null where skip is
};
// gradients: as PlainSsdBackwardChunkStates left them; used up.
template <typename T>
cudaError_t PlainSsdBackward(const CudaSsd<T>& ssd, const CudaSsdStates& states, float* gradients,
                             const CudaSsdGradients<T>& out, void* scratch, cudaStream_t stream);

}  // namespace annulus::kernels
