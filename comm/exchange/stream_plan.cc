#include "stream_plan.h"

#include <algorithm>
#include <map>

#include "binding.h"
#include "plan_text.h"

namespace annulus {
namespace {

int64_t Aligned(int64_t bytes) { return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes; }

}  // namespace

StreamPlan::StreamPlan(const ExchangePlan& plan, int cp_rank)
    : name(plan.name),
      pass(plan.pass),
      problem(plan.problem),
      groups(plan.groups),
      rank(plan.ranks[static_cast<size_t>(cp_rank)]) {
  for (const RankPlan& each : plan.ranks) slots_.push_back(each.slots);
  std::vector<std::vector<Launch>> all = LaunchesOf(plan);
  for (const std::vector<Launch>& ranks_launches : all) {
    for (const Launch& launch : ranks_launches) {
      if (launch.lane != ExchangeLane::kCompute) lanes.set(static_cast<size_t>(launch.lane));
    }
  }
  launches = std::move(all[static_cast<size_t>(cp_rank)]);
  for (size_t s = 0; s < rank.steps.size(); ++s) {
    texts.push_back(StepText(plan, cp_rank, s));
    const bool moves = IsTransfer(rank.steps[s].kind);
    rows.push_back(moves ? RowsInSlot(plan, cp_rank, rank.steps[s]) : RowRange());
  }
  AddWaits();
  AddPools(plan);
  AddPeerRows(plan, cp_rank);
}

void StreamPlan::AddWaits() {
  const size_t count = rank.steps.size();
  compute_waits.resize(count);
  is_awaited.resize(count);
  needed_by.resize(count, count);
  for (size_t s = 0; s < count; ++s) {
    const Step& step = rank.steps[s];
    for (const int before : step.after) {
      const size_t b = static_cast<size_t>(before);
      const bool computes = IsCompute(rank.steps[b].kind);
      if (IsTransfer(step.kind) || !computes) is_awaited[b] = true;
      if (IsCompute(step.kind) && !computes && needed_by[b] == count) {
        compute_waits[s].push_back(before);
        needed_by[b] = s;
      }
    }
  }
}

size_t StreamPlan::KindOf(const ExchangePlan& plan, const SlotSpec& slot) {
  const auto found = std::find(kinds.begin(), kinds.end(), slot);
  if (found != kinds.end()) return static_cast<size_t>(found - kinds.begin());
  kinds.push_back(slot);
  kind_rows.push_back(SlotRows(plan, slot));
  return kinds.size() - 1;
}

void StreamPlan::AddPools(const ExchangePlan& plan) {
  for (const RankPlan& each : plan.ranks) {
    std::vector<bool> receives(each.slots.size());
    for (const Step& step : each.steps) {
      if (step.kind == StepKind::kReceive) receives[static_cast<size_t>(step.slot)] = true;
    }
    std::vector<PoolSlot>& pool = pools.emplace_back();
    for (size_t slot = 0; slot < receives.size(); ++slot) {
      if (!receives[slot]) continue;
      // Home memory is the caller's: peers cannot know its address.
      ANNULUS_CHECK(!each.slots[slot].home) << plan.name << ": home slot " << slot << " receives";
      pool.push_back({.slot = static_cast<int>(slot), .kind = KindOf(plan, each.slots[slot])});
    }
  }
}

void StreamPlan::AddPeerRows(const ExchangePlan& plan, int cp_rank) {
  std::map<int, PeerRows> targets;  // by message to another rank
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const RankPlan& receiver = plan.ranks[r];
    std::vector<bool> taken(receiver.steps.size());
    for (const Step& step : receiver.steps) {
      for (const int before : step.after)
        if (ArrivesDuring(receiver, step, before)) taken[static_cast<size_t>(before)] = true;
    }
    for (size_t s = 0; s < receiver.steps.size(); ++s) {
      const Step& step = receiver.steps[s];
      if (step.kind != StepKind::kReceive) continue;
      messages = std::max(messages, step.message + 1);
      if (step.peer != cp_rank) continue;
      const auto place = std::find_if(pools[r].begin(), pools[r].end(),
                                      [&](const PoolSlot& slot) { return slot.slot == step.slot; });
      targets[step.message] = {.place = static_cast<size_t>(place - pools[r].begin()),
                               .begin = RowsInSlot(plan, static_cast<int>(r), step).begin,
                               .taken_as_it_comes = taken[s]};
    }
  }
  for (const Step& step : rank.steps) {
    peer_rows.push_back(step.kind == StepKind::kSend ? targets.at(step.message) : PeerRows());
  }
}

bool StreamPlan::IsOf(const ExchangePlan& plan, int cp_rank) const {
  return plan.pass == pass && plan.name == name && plan.ranks[static_cast<size_t>(cp_rank)] == rank &&
         std::equal(
             plan.ranks.begin(), plan.ranks.end(), slots_.begin(), slots_.end(),
             [](const RankPlan& each, const std::vector<SlotSpec>& slots) { return each.slots == slots; }) &&
         plan.groups == groups && plan.problem == problem;
}

PoolLayout::PoolLayout(const StreamPlan& plan, const SlotSource& source) {
  for (size_t k = 0; k < plan.kinds.size(); ++k) {
    Kind& kind = kinds_.emplace_back();
    kind.fields = source.fields(plan.kinds[k]);
    for (const SlotField& field : kind.fields) {
      kind.offsets.push_back(kind.bytes);
      kind.bytes += Aligned(plan.kind_rows[k] * RowBytes(field));
    }
  }
  for (const std::vector<StreamPlan::PoolSlot>& slots : plan.pools) {
    int64_t end = 0;
    std::vector<Place>& pool = pools_.emplace_back();
    for (const StreamPlan::PoolSlot& slot : slots) {
      pool.push_back({.kind = slot.kind, .offset = end});
      end += kinds_[slot.kind].bytes;
    }
    bytes_ = std::max(bytes_, end);
  }
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
