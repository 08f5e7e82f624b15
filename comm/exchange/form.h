#pragma once

// What is right or wrong about a plan's problem, head groups, slots and single steps, whatever the others do.

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// FailedPrecondition unless every index is in range, every step's slots fit what it does with them and every
// head has its group. After it, SlotRows, RowInSlot and ChunkOf may be called for all that steps name.
absl::Status CheckForm(const ExchangePlan& plan);

}  // namespace annulus
