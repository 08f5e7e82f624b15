#include "cuda/attention_hopper/timed_shapes.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace annulus::testing {

namespace {
constexpr int64_t kExtent = 4096;  // of windows, and the mean of documents
}  // namespace

const char* Name(TimedMask mask) {
  switch (mask) {
    case TimedMask::kFull:
      return "full";
    case TimedMask::kCausal:
      return "causal";
    case TimedMask::kDocuments:
      return "documents of 4K";
    case TimedMask::kWindow:
      return "window of 4K";
  }
  return "";
}

double FillTimedBounds(const TimedShape& shape, std::vector<int64_t>* lo, std::vector<int64_t>* hi) {
  std::mt19937 rng(1);
  double pairs = 0;
  int64_t start = 0, end = 0;
  for (int64_t i = 0; i < shape.rows; ++i) {
    if (i == end) start = i, end = i + 1 + static_cast<int64_t>(rng() % (2 * kExtent + 1));
    int64_t first = 0, last = i + 1;
    if (shape.mask == TimedMask::kFull) last = shape.rows;
    if (shape.mask == TimedMask::kDocuments) first = start;
    if (shape.mask == TimedMask::kWindow) first = std::max<int64_t>(0, i + 1 - kExtent);
    lo->push_back(first);
    hi->push_back(last);
    pairs += static_cast<double>(last - first);
  }
  return pairs;
}

kernels::CudaAttentionBlock<bf16> TimedBlock(const TimedShape& shape, const bf16* q, const bf16* k,
                                             const bf16* v, const int64_t* lo, const int64_t* hi) {
  const int64_t q_width = shape.heads * shape.dim, k_width = shape.kv_heads * shape.dim,
                v_width = shape.kv_heads * shape.v_dim;
  return {.q = {q, q_width, q_width},
          .k = {k, k_width, k_width},
          .v = {v, v_width, v_width},
          .q_rows = shape.rows,
          .k_rows = shape.rows,
          .batch = 1,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .dim = shape.dim,
          .v_dim = shape.v_dim,
          .lo = lo,
          .hi = hi,
          .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.dim)))};
}

#if ANNULUS_HAS_CUDNN
kernels::CudnnBlock CudnnBlockOf(const TimedShape& shape, float scale) {
  const int64_t q = shape.heads * shape.dim, k = shape.kv_heads * shape.dim, v = shape.kv_heads * shape.v_dim,
                out = shape.heads * shape.v_dim;
  return {.batch = 1,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .q_rows = shape.rows,
          .k_rows = shape.rows,
          .dim = shape.dim,
          .v_dim = shape.v_dim,
          .mask = shape.mask == TimedMask::kFull ? kernels::CudnnMask::kFull : kernels::CudnnMask::kCausal,
          .scale = scale,
          .q = {q, q},
          .k = {k, k},
          .v = {v, v},
          .out = {out, out},
          .dout = {out, out},
          .dq = {q, q},
          .dk = {k, k},
          .dv = {v, v}};
}
#endif

}  // namespace annulus::testing
