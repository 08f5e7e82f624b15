#include "binding.h"

namespace annulus {

void CheckBinding(const ExchangePlan& plan, int cp_rank, int ranks, const ExchangeBinding& binding) {
  ANNULUS_CHECK(static_cast<int>(plan.ranks.size()) == ranks)
      << plan.name << " is for " << plan.ranks.size() << " ranks, the group has " << ranks;
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  ANNULUS_CHECK(binding.slots.size() == rank.slots.size())
      << plan.name << " has " << rank.slots.size() << " slots, " << binding.slots.size() << " are bound";
  for (size_t i = 0; i < rank.slots.size(); ++i) {
    const TensorRef& slot = binding.slots[i];
    ANNULUS_CHECK(slot.rank() >= 1 && slot.dim(0) == plan.problem.block_rows)
        << plan.name << ": slot " << i << " is " << ToString(slot.shape()) << ", a block has "
        << plan.problem.block_rows << " rows";
  }
}

std::vector<TensorRef> ScratchSlots(Context& ctx, const RankPlan& rank, TensorRef home_kv,
                                    TensorRef home_grad) {
  std::vector<TensorRef> slots;
  for (const SlotSpec& slot : rank.slots) {
    const TensorRef& like = slot.payload == Payload::kKv ? home_kv : home_grad;
    slots.push_back(slot.home ? like : ctx.scratch.Allocate(like.dtype(), like.shape()));
  }
  return slots;
}

}  // namespace annulus
