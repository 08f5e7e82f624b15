#pragma once

// What the attention layers of a step choose their plans from.

#include "annulus/study/step_cost.h"
#include "annulus/train/exchange.h"

namespace annulus {

// Of one micro-batch, with meta tokens; documents are not masked.
SequenceBatch WholeSequences(const RunSpec& spec);

struct PricedBatch {
  SequenceBatch sequences;
  std::string note;  // where documents are masked: what it is
};
// Where documents are masked, that of the run's first micro-batches whose pairs of queries and keys are
// nearest to their mean; whole sequences else, and where the data are not there.
PricedBatch TypicalBatch(const RunSpec& spec);

ExchangeOptions ExchangeOptionsFor(const RunSpec& spec, const MachineProfile& machine, PlanEffort effort);

}  // namespace annulus
