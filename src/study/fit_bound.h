#pragma once

// What a layout takes at least, without looking for its exchange plans or without simulating its step.

#include <cstdint>
#include <vector>

#include "annulus/study/step_cost.h"

namespace annulus {

// Seconds that each exchange of StepCost::exchanges takes at least; empty: not known.
using LeastExchanges = std::vector<double>;

// Seconds of a step: those of a tensor-parallel group that has its share of the attention, or its host's
// share of what attention sends between hosts, and waits for no other group. No plans are built.
absl::StatusOr<double> LeastSeconds(const RunSpec& spec, const MachineProfile& machine,
                                    const LeastExchanges& known = {});

// The same of a step whose plans are known: of the ranks with most attention.
double LeastSeconds(const RunSpec& spec, const MachineProfile& machine, StepCost cost);

// What exchanges of the same mesh take at least with another micro-batch: more sequences together take no
// less time, and no more for each of them.
LeastExchanges ExchangesAtLeast(const std::vector<ExchangePass>& exchanges, int64_t micro_batch,
                                int64_t other_micro_batch);

// Memory of a rank, exchange buffers left out.
int64_t LeastBytes(const RunSpec& spec, const MachineProfile& machine);

}  // namespace annulus
