#pragma once

// What the attention layers of a step choose their plans from.

#include "annulus/study/step_cost.h"
#include "annulus/train/exchange.h"

namespace annulus {

// Of one micro-batch, with meta tokens; documents are not masked.
SequenceBatch WholeSequences(const RunSpec& spec);

ExchangeOptions ExchangeOptionsFor(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort);

}  // namespace annulus
