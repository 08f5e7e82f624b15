#pragma once

// SiLU (Hendrycks and Gimpel, 2016): y = x * sigmoid(x); and the sigmoid alone.

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

// x, y: [tokens, columns]; y may be x.
absl::Status SiluForward(Context& ctx, ConstMatrixRef x, MatrixRef y);
// dx is overwritten; it may be dy.
absl::Status SiluBackward(Context& ctx, ConstMatrixRef x, ConstMatrixRef dy, MatrixRef dx);

// y = sigmoid(x).   x: compute dtype   y: [tokens, columns], accumulator dtype, overwritten
absl::Status SigmoidForward(Context& ctx, ConstMatrixRef x, TensorRef y);
// dx is overwritten.   y: as SigmoidForward gave it   dy: as y   dx: as x
absl::Status SigmoidBackward(Context& ctx, ConstTensorRef y, ConstTensorRef dy, MatrixRef dx);

}  // namespace annulus
