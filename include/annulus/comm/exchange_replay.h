#pragma once

// A plan of a whole group run in one thread: every rank's slots lie in this process, a message is a copy.

#include <cstdint>
#include <vector>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// Runs all steps of all ranks on host memory, `ranks[r]` bound as rank r's part. Of all steps that the plan
// allows to be next, one drawn by `seed` is: whatever delays and stalls can do to a run, some seed does. A
// message is moved when both ends allow it. Returns the first error of a `compute`; FailedPrecondition if no
// step is allowed before the end.
absl::Status Replay(const ExchangePlan& plan, const std::vector<ExchangeBinding>& ranks, uint64_t seed);

}  // namespace annulus
