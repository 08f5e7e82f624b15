#pragma once

// Time steps and decays of Mamba-2:
//
//   dt = clamp(softplus(raw + bias), low, high)     a = -e^{a_log} dt
//
// and of gated DeltaNet, where a = -e^{a_log} softplus(raw + bias) alone is used. All but raw in the
// accumulator dtype.

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

struct MambaGates {
  ConstMatrixRef raw;           // [tokens, heads], compute dtype
  ConstTensorRef bias, a_log;   // [heads]
  double low = 0, high = 0;     // high 0: no upper limit
};

// dt, a: [tokens, heads], overwritten
absl::Status MambaGatesForward(Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a);
// draw (as raw) is overwritten; dbias, da_log [heads] are added to. ddt undefined: zero.
absl::Status MambaGatesBackward(Context& ctx, const MambaGates& gates, ConstTensorRef ddt, ConstTensorRef da,
                                MatrixRef draw, TensorRef dbias, TensorRef da_log);

}  // namespace annulus
