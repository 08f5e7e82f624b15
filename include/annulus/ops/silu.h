#pragma once

// SiLU (Hendrycks and Gimpel, 2016): y = x * sigmoid(x).

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

// x, y: [tokens, columns]; y may be x.
absl::Status SiluForward(Context& ctx, ConstMatrixRef x, MatrixRef y);
// dx is overwritten; it may be dy.
absl::Status SiluBackward(Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx);

}  // namespace annulus
