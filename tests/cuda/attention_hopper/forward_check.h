#pragma once

#include "cuda/attention_mma/cases.h"

namespace annulus::testing {

// Scores of the second key tile are far above what the first lets expect: its weights are made again.
inline Case RisingScores(int64_t dim, int64_t v_dim) {
  Case c{"full, rising scores", dim, v_dim, 150, 256, 1, 2, 1, Mask::kFull};
  c.spread = 0.4;
  c.growth = 8;
  return c;
}

// Checks the Hopper forward on one case, with a carry and without; prints what it found.
bool CheckForward(Prepared& prepared);

}  // namespace annulus::testing
