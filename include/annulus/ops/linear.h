#pragma once

// Matrix products on cuBLAS-like row-major matrices with a leading dimension (CPU: CBLAS, GPU: cuBLASLt).

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/write.h"

namespace annulus {

// [rows, cols], row i starts at element i * stride; stride >= cols. A TensorRef of any rank converts with
// its last dimension as columns.
template <typename Byte>
struct BasicMatrixRef {
  Byte* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0, cols = 0, stride = 0;

  BasicMatrixRef() = default;
  BasicMatrixRef(Byte* d, DType t, int64_t r, int64_t c, int64_t s)
      : data(d), dtype(t), rows(r), cols(c), stride(s) {}
  template <typename OtherByte>
  BasicMatrixRef(const BasicTensorRef<OtherByte>& t)  // NOLINT: implicit on purpose
      : data(t.raw()), dtype(t.dtype()), cols(t.dim(t.rank() - 1)), stride(cols) {
    rows = 1;  // an empty last dimension leaves the row count to the other dimensions
    for (int d = 0; d + 1 < t.rank(); ++d) rows *= t.dim(d);
  }
  operator BasicMatrixRef<const void>() const { return {data, dtype, rows, cols, stride}; }
  // Columns [begin, end).
  BasicMatrixRef Cols(int64_t begin, int64_t end) const {
    using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
    return {static_cast<Char*>(data) + begin * SizeOf(dtype), dtype, rows, end - begin, stride};
  }
};
using MatrixRef = BasicMatrixRef<void>;
using ConstMatrixRef = BasicMatrixRef<const void>;

// y[t, out] (=, +=) sum_in x[t, in] w[out, in]
absl::Status LinearForward(Context& ctx, ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y);
// dx[t, in] (=, +=) sum_out dy[t, out] w[out, in]   dx: dtype of dy or its accumulator dtype
absl::Status LinearBackwardInput(Context& ctx, ConstMatrixRef dy, ConstMatrixRef w, Write write,
                                 MatrixRef dx);
// dw[out, in] += sum_t dy[t, out] x[t, in]   dw: accumulator dtype
absl::Status LinearBackwardWeight(Context& ctx, ConstMatrixRef dy, ConstMatrixRef x, MatrixRef dw);

}  // namespace annulus
