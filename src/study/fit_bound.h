#pragma once

// What a layout takes at least, without looking for its exchange plans.

#include <cstdint>

#include "annulus/study/step_cost.h"

namespace annulus {

// Seconds of a step that a rank computes at least.
absl::StatusOr<double> ComputingSeconds(const RunSpec& spec, const MachineProfile& machine);

// Memory of a rank, exchange buffers left out.
int64_t LeastBytes(const RunSpec& spec, const MachineProfile& machine);

}  // namespace annulus
