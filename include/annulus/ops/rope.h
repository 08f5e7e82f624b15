#pragma once

// Rotary position embedding (Su et al., 2021) in the half-split convention: element i of a head is paired
// with element i + head_dim / 2; the pair turns by position * theta^(-2i / head_dim).

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus {

enum class RopeDirection { kForward, kInverse };  // the inverse is also the gradient

// Rotates x in place. positions: global position of each row of x; every item of a row's batch has the same.
//   x: [rows, batch, heads, head_dim]   positions: i64 [rows]
absl::Status Rope(Context& ctx, ConstTensorRef positions, double theta, RopeDirection direction, HeadsRef x);

}  // namespace annulus
