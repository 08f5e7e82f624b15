#pragma once

// SwiGLU (Shazeer, 2020): h = silu(gate) * up.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// gate_up: [tokens, 2 * d_ff], gate first   h: [tokens, d_ff]
absl::Status SwigluForward(Context& ctx, ConstTensorRef gate_up, TensorRef h);
// dgate_up is overwritten.
absl::Status SwigluBackward(Context& ctx, ConstTensorRef gate_up, ConstTensorRef dh, TensorRef dgate_up);

}  // namespace annulus
