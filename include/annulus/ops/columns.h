#pragma once

// Columns of rows that lie elsewhere in the rows of another tensor: heads picked out of all heads, and put
// back.
//
//   x: | h0 h1 h2 h3 |     runs {h2, h3} -> 0     y: | h2 h3 |

#include <cstdint>

#include "absl/types/span.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/write.h"

namespace annulus {

// Columns [from, from + columns) of x are columns [to, to + columns) of y.
struct ColumnRun {
  int64_t from = 0, to = 0, columns = 0;
  friend bool operator==(const ColumnRun&, const ColumnRun&) = default;
};

// y = x or y += x in the columns of `runs`; others stay as they are. Runs may name columns of x more than
// once, and of y too: those become the sum. Rounded once for each run that names them, sums in f32 or wider.
//   x, y: [rows, batch, columns of its own], each in any compute dtype of the device
absl::Status MoveColumns(Context& ctx, ConstTensorRef x, absl::Span<const ColumnRun> runs, Write write,
                         TensorRef y);

}  // namespace annulus
