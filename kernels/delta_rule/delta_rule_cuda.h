#pragma once

// CUDA kernels of annulus/ops/delta_rule.h, in chunks and f32 arithmetic (Yang et al., 2024, section 3),
// whose products are on tensor cores (split_product.cuh). A rule is a scan as in ssd_cuda.h whose inputs are
// corrected by what the state holds already: x = v, b = k, c = q, dt = beta, state = K, dim = V. Inside a
// chunk, with L the decays between rows,
//
//   B = (K K^T) o L below the diagonal, P = (Q K^T) o L     A = beta B     T = (I + A)^-1
//   U = T beta V     W = T beta from_start K                delta = U - W S_0
//   o = from_start Q S_0 + P delta                          S_end = decay S_0 + (to_end K)^T delta
//
// so that chunks depend on each other by two small products only, which ScanDelta does one after the other.

#include "kernels/common/heads_shape_cuda.h"
#include "kernels/ssd/ssd_cuda.h"

namespace annulus::kernels {

// Chunks must be short enough for their matrices to fit in shared memory: at most 128 rows, key_dim at most
// 256.
inline constexpr int64_t kMaxDeltaChunk = 128, kMaxDeltaKeyDim = 256;

// Scratch memory of each call below, in bytes.
template <typename T>
int64_t CudaDeltaScratchBytes(const CudaSsd<T>& rule);

// transition: [segments, batch * heads, K, K]
template <typename T>
cudaError_t CudaDeltaSummary(const CudaSsd<T>& rule, const CudaSsdSummary& summary, void* scratch,
                             cudaStream_t stream);
// states: [chunks, batch * heads, K, V]
template <typename T>
cudaError_t CudaDeltaForward(const CudaSsd<T>& rule, const float* initial, float* states, StridedRows<T> o,
                             void* scratch, cudaStream_t stream);
template <typename T>
cudaError_t CudaDeltaBackwardSummary(const CudaSsd<T>& rule, StridedRows<const T> dout,
                                     const CudaSsdSummary& summary, void* scratch, cudaStream_t stream);

template <typename T>
struct CudaDeltaGradients {
  StridedRows<const T> dout;
  const float* states = nullptr;
  const float* final_gradient = nullptr;  // null: 0
  StridedRows<T> dq, dk, dv;
  float* dbeta = nullptr;
  float* da = nullptr;
};
template <typename T>
cudaError_t CudaDeltaBackward(const CudaSsd<T>& rule, const CudaDeltaGradients<T>& gradients, void* scratch,
                              cudaStream_t stream);

// y = x / sqrt(sum x^2 + eps) for each head.
template <typename T>
cudaError_t CudaL2NormForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, float eps,
                              StridedRows<T> y, cudaStream_t stream);
template <typename T>
cudaError_t CudaL2NormBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, float eps,
                               StridedRows<const T> dy, StridedRows<T> dx, cudaStream_t stream);

}  // namespace annulus::kernels
