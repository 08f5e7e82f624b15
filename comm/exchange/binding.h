#pragma once

// Memory of a plan's slots: what every way to run a plan needs of it.

#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// The caller broke an invariant unless one tensor of the block's rows is bound to each slot.
void CheckBinding(const ExchangePlan& plan, int cp_rank, int ranks, const ExchangeBinding& binding);

// The rows of a transfer or of one side of a kReduce.
inline TensorRef RowsOf(const ExchangeBinding& binding, int slot, const RowRange& rows) {
  return binding.slots[static_cast<size_t>(slot)].Rows(rows.begin, rows.end);
}

// Home slots are the caller's tensors, all others come from ctx.scratch.
std::vector<TensorRef> ScratchSlots(Context& ctx, const RankPlan& rank, TensorRef home_kv,
                                    TensorRef home_grad);

}  // namespace annulus
