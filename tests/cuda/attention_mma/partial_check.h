#pragma once

namespace annulus::testing {

// The reset of partial results and the delta of the backward, in every dtype.
bool CheckPartialPasses();

}  // namespace annulus::testing
