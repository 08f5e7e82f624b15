#pragma once

namespace annulus::testing {

// Times the forward on sequences of many kinds beside the other kernels, and compares results with them.
bool TimeForward();

}  // namespace annulus::testing
