#include "stream_plan.h"

#include <algorithm>
#include <map>

#include "plan_text.h"

namespace annulus {
namespace {

// Places of a rank's slots in its pool, and its end.
struct Pool {
  explicit Pool(const RankPlan& rank) : places(rank.slots.size()) {
    std::vector<bool> receives(rank.slots.size());
    for (const Step& step : rank.steps) {
      if (step.kind == StepKind::kReceive) receives[static_cast<size_t>(step.slot)] = true;
    }
    for (size_t slot = 0; slot < rank.slots.size(); ++slot) {
      if (!receives[slot]) continue;
      // Home memory is the caller's: peers cannot know its address.
      ANNULUS_CHECK(!rank.slots[slot].home) << "home slot " << slot << " receives";
      places[slot] = end;
      ++(rank.slots[slot].payload == Payload::kKv ? end.kv_slots : end.grad_slots);
    }
  }

  std::vector<std::optional<PoolPlace>> places;
  PoolPlace end;
};

}  // namespace

StreamPlan::StreamPlan(const ExchangePlan& plan, int cp_rank)
    : name(plan.name),
      pass(plan.pass),
      problem(plan.problem),
      rank(plan.ranks[static_cast<size_t>(cp_rank)]),
      launches(std::move(LaunchesOf(plan)[static_cast<size_t>(cp_rank)])) {
  const size_t count = rank.steps.size();
  compute_waits.resize(count);
  is_awaited.resize(count);
  std::vector<bool> waited_for(count);
  for (size_t s = 0; s < count; ++s) {
    const Step& step = rank.steps[s];
    ANNULUS_CHECK(IsCompute(step.kind) || IsTransfer(step.kind)) << StepText(plan, cp_rank, s);
    texts.push_back(StepText(plan, cp_rank, s));
    for (const int before : step.after) {
      const size_t b = static_cast<size_t>(before);
      const bool computes = IsCompute(rank.steps[b].kind);
      if (IsTransfer(step.kind) || !computes) is_awaited[b] = true;
      if (IsCompute(step.kind) && !computes && !waited_for[b]) {
        compute_waits[s].push_back(before);
        waited_for[b] = true;
      }
    }
  }

  std::map<int, PoolPlace> targets;  // by message
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    Pool ranks_pool(plan.ranks[r]);
    for (const Step& step : plan.ranks[r].steps) {
      if (step.kind != StepKind::kReceive) continue;
      targets[step.message] = *ranks_pool.places[static_cast<size_t>(step.slot)];
      messages = std::max(messages, step.message + 1);
    }
    pool_ends.push_back(ranks_pool.end);
    if (static_cast<int>(r) == cp_rank) pool = std::move(ranks_pool.places);
  }
  for (const Step& step : rank.steps) {
    peer_place.push_back(step.kind == StepKind::kSend ? targets.at(step.message) : PoolPlace());
  }
}

bool StreamPlan::IsOf(const ExchangePlan& plan, int cp_rank) const {
  return plan.pass == pass && plan.name == name && plan.ranks[static_cast<size_t>(cp_rank)] == rank &&
         plan.problem == problem;
}

int64_t StreamPlan::PoolBytes(const SlotBytes& bytes) const {
  int64_t most = 0;
  for (const PoolPlace& end : pool_ends) most = std::max(most, OffsetOf(end, bytes));
  return most;
}

const StreamPlan& StreamPlans::Of(const ExchangePlan& plan, int cp_rank) {
  const auto found = std::find_if(plans_.begin(), plans_.end(),
                                  [&](const auto& known) { return known->IsOf(plan, cp_rank); });
  if (found != plans_.end()) {
    std::rotate(plans_.begin(), found, found + 1);
    return *plans_.front();
  }
  if (plans_.size() == kKept) plans_.pop_back();
  plans_.insert(plans_.begin(), std::make_unique<const StreamPlan>(plan, cp_rank));
  return *plans_.front();
}

}  // namespace annulus
