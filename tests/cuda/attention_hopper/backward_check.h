#pragma once

#include "cuda/attention_mma/cases.h"

namespace annulus::testing {

// Checks the Hopper backward on one case, in any order of sums and in a fixed one; prints what it found.
bool CheckBackward(Prepared& prepared);

// A thousand runs in a fixed order, all of the same bits.
bool CheckBackwardRepeats();

}  // namespace annulus::testing
