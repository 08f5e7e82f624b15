#pragma once

namespace annulus {

// The two halves of a training step.
enum class Pass { kForward, kBackward };

}  // namespace annulus
