#pragma once

// RMSNorm (Zhang and Sennrich, 2019): y = w * x / sqrt(mean(x^2) + eps) over the last dimension.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// x, y: [tokens, d]   w: [d]. y may be x.
absl::Status RmsNormForward(Context& ctx, ConstTensorRef x, ConstTensorRef w, double eps, TensorRef y);

// The inverse norm is recomputed from x. dx += the gradient through the norm; dw += its weight's gradient.
//   x, dy, dx: [tokens, d]   w: [d]   dw: [d], accumulator dtype
absl::Status RmsNormBackward(Context& ctx, ConstTensorRef x, ConstTensorRef w, ConstTensorRef dy, double eps,
                             TensorRef dx, TensorRef dw);

}  // namespace annulus
