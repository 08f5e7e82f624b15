#include "binding.h"

#include <algorithm>

namespace annulus {

void CheckBinding(const ExchangePlan& plan, int cp_rank, int ranks, const ExchangeBinding& binding) {
  ANNULUS_CHECK(static_cast<int>(plan.ranks.size()) == ranks)
      << plan.name << " is for " << plan.ranks.size() << " ranks, the group has " << ranks;
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  ANNULUS_CHECK(binding.slots.size() == rank.slots.size())
      << plan.name << " has " << rank.slots.size() << " slots, " << binding.slots.size() << " are bound";
  for (size_t i = 0; i < rank.slots.size(); ++i) {
    const int64_t rows = SlotRows(plan, rank.slots[i]);
    ANNULUS_CHECK(!binding.slots[i].fields.empty()) << plan.name << ": slot " << i << " has no fields";
    for (const TensorRef& field : binding.slots[i].fields) {
      ANNULUS_CHECK(field.rank() >= 1 && field.dim(0) == rows)
          << plan.name << ": a field of slot " << i << " is " << ToString(field.shape()) << ", the slot has "
          << rows << " rows";
    }
  }
  ANNULUS_CHECK(binding.compute || std::none_of(rank.steps.begin(), rank.steps.end(),
                                                [](const Step& step) { return IsCompute(step.kind); }))
      << plan.name << ": no `compute` is bound";
}

RowRange RowsInSlot(const ExchangePlan& plan, int cp_rank, const Step& step) {
  const SlotSpec& slot = plan.ranks[static_cast<size_t>(cp_rank)].slots[static_cast<size_t>(step.slot)];
  const int64_t begin = RowInSlot(plan, slot, step.rows);
  return {begin, begin + step.rows.rows.size()};
}

int64_t RowBytes(const SlotField& field) { return field.row.elements() * SizeOf(field.dtype); }

Shape FieldShape(const SlotField& field, int64_t rows) {
  std::vector<int64_t> dims = {rows};
  dims.insert(dims.end(), field.row.dims().begin(), field.row.dims().end());
  return Shape(absl::MakeConstSpan(dims));
}

SlotMemory ScratchSlot(Context& ctx, const std::vector<SlotField>& fields, int64_t rows) {
  SlotMemory slot;
  for (const SlotField& field : fields) {
    slot.fields.push_back(ctx.scratch.Allocate(field.dtype, FieldShape(field, rows)));
  }
  return slot;
}

std::vector<SlotMemory> ScratchSlots(Context& ctx, const ExchangePlan& plan, int cp_rank,
                                     const SlotSource& source) {
  std::vector<SlotMemory> slots;
  for (const SlotSpec& slot : plan.ranks[static_cast<size_t>(cp_rank)].slots) {
    slots.push_back(slot.home ? source.home(slot.payload)
                              : ScratchSlot(ctx, source.fields(slot), SlotRows(plan, slot)));
  }
  return slots;
}

}  // namespace annulus
