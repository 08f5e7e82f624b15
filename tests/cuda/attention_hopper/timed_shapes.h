#pragma once

// What forward and backward of block attention on Hopper are timed on.

#include <cstdint>
#include <vector>

#include "cuda/attention_mma/device_arrays.h"
#if ANNULUS_HAS_CUDNN
#include "kernels/attention/cudnn_attention.h"
#endif

namespace annulus::testing {

enum class TimedMask { kFull, kCausal, kDocuments, kWindow };
const char* Name(TimedMask mask);

// One item, with as many keys as queries.
struct TimedShape {
  int64_t dim, v_dim, rows, heads, kv_heads;
  TimedMask mask = TimedMask::kCausal;
};

// Bounds of each row; returns the pairs of query and key of one head.
double FillTimedBounds(const TimedShape& shape, std::vector<int64_t>* lo, std::vector<int64_t>* hi);

// All keys, in dense tensors.
kernels::CudaAttentionBlock<bf16> TimedBlock(const TimedShape& shape, const bf16* q, const bf16* k,
                                             const bf16* v, const int64_t* lo, const int64_t* hi);

#if ANNULUS_HAS_CUDNN
// cuDNN knows full and causal blocks.
inline bool CudnnKnows(TimedMask mask) { return mask == TimedMask::kFull || mask == TimedMask::kCausal; }
// All tensors dense.
kernels::CudnnBlock CudnnBlockOf(const TimedShape& shape, float scale);
#endif

}  // namespace annulus::testing
