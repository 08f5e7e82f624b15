#pragma once

// Causal depthwise convolution along the sequence with SiLU, as in Mamba-2:
//
//   y[t, c] = silu(bias[c] + sum over j < k of w[c, k - 1 - j] x[t - j, c])
//
// x[t - j] counts as 0 where j > ages[t]: it belongs to another document, or to none. Rows are segments of
// consecutive positions; what lies before a segment's first row is its halo.

#include <vector>

#include "annulus/base/row_range.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus {

struct Conv1d {
  ConstTensorRef w;     // [channels, k], k <= 8
  ConstTensorRef bias;  // [channels]; undefined: none
  ConstTensorRef ages;  // i32 [rows, batch]: tokens of the same document before this one
  std::vector<RowRange> segments;  // of rows, in order, together all of them
  ConstTensorRef halo;             // [segments, k - 1, batch, channels]: the rows before each
};

// x, y: [rows, batch, 1 head of `channels`]; y may not be x.
absl::Status Conv1dForward(Context& ctx, const Conv1d& conv, ConstHeadsRef x, HeadsRef y);

// dx and dhalo (as x and halo) are overwritten; dw, dbias (accumulator dtype) are added to.
struct Conv1dGradients {
  HeadsRef dx;
  TensorRef dhalo, dw, dbias;  // dbias undefined where bias is
};
absl::Status Conv1dBackward(Context& ctx, const Conv1d& conv, ConstHeadsRef x, ConstHeadsRef dy,
                            const Conv1dGradients& gradients);

}  // namespace annulus
