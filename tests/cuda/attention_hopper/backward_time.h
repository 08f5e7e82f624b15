#pragma once

namespace annulus::testing {

// Times the backward, in any order of sums and in a fixed one, beside cuDNN and the portable kernel.
void TimeBackward();

}  // namespace annulus::testing
