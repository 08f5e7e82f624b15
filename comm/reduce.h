#pragma once

// acc = op(acc, in), element by element. Every backend sums through this one function, in rank order.

#include "annulus/comm/communicator.h"

namespace annulus {

//   in, acc: [elements] of dtype
void Accumulate(DType dtype, ReduceOp op, const void* in, int64_t elements, void* acc);

}  // namespace annulus
