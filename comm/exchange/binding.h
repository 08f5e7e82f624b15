#pragma once

// Memory of a plan's slots: what every way to run a plan needs of it.

#include <vector>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// The caller broke an invariant unless each slot has fields with the slot's rows, and a `compute` is bound
// where there are computing steps.
void CheckBinding(const ExchangePlan& plan, int cp_rank, int ranks, const ExchangeBinding& binding);

// Which rows of its slot a transfer of this rank moves, in every field.
RowRange RowsInSlot(const ExchangePlan& plan, int cp_rank, const Step& step);

int64_t RowBytes(const SlotField& field);
// Of one field of a slot with so many rows.
Shape FieldShape(const SlotField& field, int64_t rows);

// Of `cp_rank`, in its order: home slots are the caller's tensors, all others come from ctx.scratch.
std::vector<SlotMemory> ScratchSlots(Context& ctx, const ExchangePlan& plan, int cp_rank,
                                     const SlotSource& source);
SlotMemory ScratchSlot(Context& ctx, const std::vector<SlotField>& fields, int64_t rows);

}  // namespace annulus
