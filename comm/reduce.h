#pragma once

// Sums, maxima and minima over ranks, element by element. Every host backend takes them through this one
// file, in rank order, so their bits depend on the operands only. bf16 is summed in f32 and rounded once.

#include "absl/types/span.h"
#include "annulus/comm/communicator.h"

namespace annulus {

// out = op over `operands` in their order, at least one.
//   operands: each [elements] of dtype      out: [elements] of dtype, may be one of the operands
void Reduce(DType dtype, ReduceOp op, absl::Span<const void* const> operands, int64_t elements, void* out);

// acc = op(acc, in)
void Accumulate(DType dtype, ReduceOp op, const void* in, int64_t elements, void* acc);

}  // namespace annulus
