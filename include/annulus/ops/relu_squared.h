#pragma once

// Squared ReLU (So et al., 2021): h = max(x, 0)^2.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// x, h: [tokens, d_ff]; h may be x.
absl::Status ReluSquaredForward(Context& ctx, ConstTensorRef x, TensorRef h);
// dx is overwritten; it may be dh.
absl::Status ReluSquaredBackward(Context& ctx, ConstTensorRef x, ConstTensorRef dh, TensorRef dx);

}  // namespace annulus
