#pragma once

#include <string>

namespace annulus {

// For a watchdog, from any thread: the ranks of the world that MPI operations under way need, with their hosts:
// "rank 2 on host1, rank 3 on host1". Empty if there are none, or no MpiSession.
std::string AwaitedRanks();

}  // namespace annulus
