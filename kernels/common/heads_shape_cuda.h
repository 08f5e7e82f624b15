#pragma once

// Counts of heads [rows, batch, heads, dim] for launchers; where they lie is a StridedRows.

#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {

struct HeadsShape {
  int64_t rows = 0, batch = 0, heads = 0;
};

}  // namespace annulus::kernels
