#pragma once

namespace annulus::testing {

// Times one launch over an arena beside a launch per chunk that waits for its flag, for chunks that arrive at
// several rates; false where results differ from those of a launch over all keys.
bool TimeArena();

}  // namespace annulus::testing
