#pragma once

#include "cuda/attention_mma/cases.h"

namespace annulus::testing {

// Checks the Hopper forward on one case, with a carry and without; prints what it found.
bool CheckForward(Prepared& prepared);

}  // namespace annulus::testing
